"""A run goes on at any other cut of its pipeline and any other size of its vision tower, optimizer included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import compositions
from tests.compositions import Composition
from tests.ranks import run_ranks
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

CHAINS: dict[int, list[dict[str, Any]]] = {
    2: [
        dict(pipeline=2, layers=[1, 4]),
        dict(tensor=2, vision=1, sequence=True),
        dict(pipeline=2, virtual=2, layers=[1, 2, 1, 1]),
        dict(tensor=2),
        dict(tensor=2, vision=1, distributed_optimizer=True),
        dict(pipeline=2, layers=[3, 2]),
    ],
    4: [
        dict(pipeline=4, layers=[2, 1, 1, 1]),
        dict(tensor=2, vision=1, distributed_optimizer=True),
        dict(tensor=2, vision=1, pipeline=2, layers=[1, 4]),
        dict(tensor=4, vision=1),
        dict(tensor=2, distributed_optimizer=True),
        dict(pipeline=4),
    ],
}


def model() -> ModelConfig:
    """With a projector whose words are split unevenly over tensor ranks."""
    cfg = Composition(
        tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary", language="smollm2", layout="ovis"
    ).config()
    return replace(cfg, language=replace(cfg.language, num_layers=5))


def train(chain: list[dict[str, Any]], folder: Path, start: int, save: bool) -> list[float]:
    """A step at each layout, each going on from the checkpoint of the one before."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import checkpoint, optim, step

    cfg, losses = model(), []
    rates = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2, warmup_steps=0)
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for number, layout in enumerate(chain, start):
            parallel = ParallelConfig(**({"distributed_optimizer": False} | layout))
            ranks = groups.lay_out(parallel, seed=0)
            chunks = build_model(cfg, parallel, "fp32", seed=number)
            if number:
                checkpoint.load_weights(checkpoint.find(folder), chunks)
            optim.freeze(chunks, optim.part_rates(rates))
            wrapped = optim.wrap(chunks, parallel)
            optimizer = optim.build_optimizer(rates, parallel, "fp32", wrapped)
            step.prepare_model(wrapped)
            if number:
                checkpoint.load_optimizer(checkpoint.find(folder), chunks, optimizer, number)
            rows = compositions.rows(cfg, 4, 1000 * number, capacity=192)[ranks.data_rank :: ranks.data]
            places = {"context": (ranks.context_rank, ranks.context), "sharing": chunks[0].image_place}
            batches = [
                model_batch(row, cfg, image_token=compositions.IMAGE, device=device.device(), **places) for row in rows
            ]
            optim.set_rates(optimizer, rates, 1, 2)
            result = step.train_step(wrapped, optimizer, batches, rates.clip_grad)
            speaks = ranks.last_stage and ranks.tensor_rank == 0
            total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            losses.append(total / count)
            if save:
                checkpoint.save(
                    folder,
                    number + 1,
                    ranks=ranks,
                    chunks=chunks,
                    optimizer=optimizer,
                    state={"updates": number + 1},
                    write_extras=lambda path: None,
                    keep=1,
                )
        groups.stop()
    return losses


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_at_any_other_cut(world: int, tmp_path: Path) -> None:
    chain = CHAINS[world]
    whole = run_ranks(train, 1, [{}] * (len(chain) + 1), tmp_path / "whole", 0, True)[0]
    for losses in run_ranks(train, world, chain, tmp_path / "cut", 0, True):
        assert losses == pytest.approx(whole[:-1], rel=1e-5)
    # What the last layout left, read by one process
    last = run_ranks(train, 1, [{}], tmp_path / "cut", len(chain), False)[0]
    assert last == pytest.approx(whole[-1:], rel=1e-5)
    assert len({round(loss, 5) for loss in whole}) == len(whole), "the witness itself must move"
