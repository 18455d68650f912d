"""Any tower, reduction, projector and decoder train alike at every layout: 30 compositions, drawn with a fixed seed."""

from __future__ import annotations

import pytest

from tests import compositions
from tests.compositions import Composition
from tests.ranks import run_ranks
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

COUNT, SEED, STEPS, ROWS = 30, 2026, 3, 4
REPLICAS = dict(distributed_optimizer=False)
"""Four data-parallel ranks of tensor=1: a row each, the second one's without any image."""
SPLIT = dict(tensor=2, pipeline=2, sequence=True, distributed_optimizer=False)


def train(composition: Composition, layout: dict[str, object]) -> list[float]:
    """Loss per supervised token of each step, as the whole job sees it."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg, parallel = composition.config(), ParallelConfig(**layout)  # type: ignore[arg-type]
    rates = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    losses = []
    ranks = groups.lay_out(parallel, seed=0)
    chunks = build_model(cfg, parallel, "fp32", seed=0)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
    step.prepare_model(model)
    for number in range(1, STEPS + 1):
        mine = compositions.rows(cfg, ROWS, seed=1000 * number)[ranks.data_rank :: ranks.data]
        batches = [model_batch(r, cfg, image_token=compositions.IMAGE, device=device.device()) for r in mine]
        optim.set_rates(optimizer, rates, number, STEPS)
        result = step.train_step(model, optimizer, batches, rates.clip_grad)
        speaks = ranks.last_stage and ranks.tensor_rank == 0
        total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
        losses.append(total / count)
    return losses


def train_all(drawn: list[Composition]) -> list[tuple[list[float], list[float]]]:
    from vlm_nemo.runtime import device, groups

    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for composition in drawn:
            try:
                found.append((train(composition, REPLICAS), train(composition, SPLIT)))
            except Exception as error:
                error.add_note(f"composition: {composition}")
                raise
    return found


def test_what_is_drawn_holds_every_part() -> None:
    drawn = compositions.draw(COUNT, SEED)
    assert len(set(drawn)) == COUNT
    for part, names in (
        ("tower", compositions.TOWERS),
        ("reduction", compositions.REDUCTIONS),
        ("projector", compositions.PROJECTORS),
        ("language", compositions.LANGUAGES),
    ):
        assert {getattr(composition, part) for composition in drawn} == set(names)


def test_compositions_train_alike_whole_and_split() -> None:
    drawn = compositions.draw(COUNT, SEED)
    for rank in run_ranks(train_all, 4, drawn):
        for composition, (whole, split) in zip(drawn, rank, strict=True):
            assert whole == pytest.approx(split, rel=1e-5), str(composition)
            assert len(set(whole)) == STEPS, f"{composition}: the witness itself must move"
