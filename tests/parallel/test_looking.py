"""A decoder that looks at images trains alike under every layout: loss and gradient norm, rows without images too."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.model.looking import SAMPLES, looking_model, row
from tests.ranks import run_ranks
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tp2": (2, dict(tensor=2, distributed_optimizer=False)),
    "tp2_sp_recompute": (2, dict(tensor=2, sequence=True, recompute="full", distributed_optimizer=False)),
    "pp2": (2, dict(pipeline=2, distributed_optimizer=False)),
    "dp2": (2, dict(distributed_optimizer=True)),
    "tp2_pp2": (4, dict(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)),
}
STEPS = 3


def train(parallel: ParallelConfig) -> list[tuple[float, float]]:
    """(loss per supervised token, gradient norm) of each step, as the whole job sees them."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg = looking_model()
    rows = [row(SAMPLES, 32), row(SAMPLES[1:2], 32), row(SAMPLES[::-1], 32), row(SAMPLES[2:], 32)]
    optim_cfg = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2, weight_decay=0.1, clip_grad=1.0)
    history = []
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        for name, parameter in chunks[0].named_parameters():
            if name.endswith("_gate"):  # they start at zero, where the image has no say
                torch.nn.init.constant_(parameter, 0.6)
        optim.freeze(chunks, optim.part_rates(optim_cfg))
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(optim_cfg, parallel, "fp32", model)
        step.prepare_model(model)
        for number in range(1, STEPS + 1):
            mine = rows[ranks.data_rank :: ranks.data]
            batches = [model_batch(r, cfg, image_token=tiny.IMAGE, device=device.device()) for r in mine]
            optim.set_rates(optimizer, optim_cfg, number, STEPS)
            result = step.train_step(model, optimizer, batches, optim_cfg.clip_grad)
            speaks = ranks.last_stage and ranks.tensor_rank == 0
            total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            history.append((total / count, result.grad_norm))
    return history


def train_all(layouts: list[dict[str, object]]) -> list[list[tuple[float, float]]]:
    from vlm_nemo.runtime import groups

    # One job, laid out anew for each: its ranks meet at one address, once
    histories = [train(ParallelConfig(**layout)) for layout in layouts]  # type: ignore[arg-type]
    groups.stop()
    return histories


@pytest.fixture(scope="module")
def one_process() -> list[tuple[float, float]]:
    return run_ranks(train_all, 1, [dict(distributed_optimizer=False)])[0][0]


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_one_process(world: int, one_process: list[tuple[float, float]]) -> None:
    names = [name for name, (size, _) in LAYOUTS.items() if size == world]
    for histories in run_ranks(train_all, world, [LAYOUTS[name][1] for name in names]):
        for name, history in zip(names, histories, strict=True):
            for found, expected in zip(history, one_process, strict=True):
                assert found == pytest.approx(expected, rel=1e-5), name
    assert len(set(one_process)) == STEPS
