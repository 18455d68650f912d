"""Every layout trains like one process: loss and gradient norm over 5 optimizer steps, three ways of freezing."""

from __future__ import annotations

import itertools

import pytest

from tests import tiny
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.processes import run_ranks
from vlm_nemo.train.config import OptimConfig

FROZEN = {
    "none": dict(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2),
    "stage1": dict(projector_lr=2e-2),
    "stage2": dict(projector_lr=1e-2, language_lr=5e-3),
}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tp2": (2, dict(tensor=2, distributed_optimizer=False)),
    "tp2_sp": (2, dict(tensor=2, sequence=True, distributed_optimizer=False)),
    "tp2_recompute": (2, dict(tensor=2, recompute="full", distributed_optimizer=False)),
    "pp2": (2, dict(pipeline=2, distributed_optimizer=False)),
    "pp2_vpp2": (2, dict(pipeline=2, virtual=2, distributed_optimizer=False)),
    "dp2": (2, dict(distributed_optimizer=False)),
    "dp2_distopt": (2, dict(distributed_optimizer=True)),
    "tp4": (4, dict(tensor=4, distributed_optimizer=False)),  # two ranks a key/value head
    "tp2_pp2": (4, dict(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)),
}
STEPS, ROWS = 5, 4


def train(parallel: ParallelConfig, frozen: str, tied: bool = False) -> list[tuple[float, float]]:
    """(loss per supervised token, gradient norm) of each step, as the whole job sees them."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg = tiny.tiny_model(tied_embeddings=tied)
    optim_cfg = OptimConfig(**FROZEN[frozen], weight_decay=0.1, clip_grad=1.0)  # type: ignore[arg-type]
    history = []
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        optim.freeze(chunks, optim.part_rates(optim_cfg))
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(optim_cfg, parallel, "fp32", model)
        step.prepare_model(model)
        for number in range(1, STEPS + 1):
            mine = tiny.rows(ROWS, seed=100 * number)[ranks.data_rank :: ranks.data]
            batches = [model_batch(r, cfg, image_token=tiny.IMAGE, device=device.device()) for r in mine]
            optim.set_rates(optimizer, optim_cfg, number, STEPS)
            result = step.train_step(model, optimizer, batches, optim_cfg.clip_grad)
            speaks = ranks.last_stage and ranks.tensor_rank == 0
            total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            assert result.applied
            history.append((total / count, result.grad_norm))
    return history


def train_all(layouts: list[dict[str, object]], cases: list[tuple[str, bool]]) -> list[list[list[tuple[float, float]]]]:
    return [[train(ParallelConfig(**layout), *case) for case in cases] for layout in layouts]  # type: ignore[arg-type]


CASES = [*itertools.product(FROZEN, [False]), ("none", True)]


@pytest.fixture(scope="module")
def one_process() -> list[list[tuple[float, float]]]:
    return run_ranks(train_all, 1, [dict(distributed_optimizer=False)], CASES)[0][0]


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_one_process(world: int, one_process: list[list[tuple[float, float]]]) -> None:
    names = [name for name, (size, _) in LAYOUTS.items() if size == world]
    found = run_ranks(train_all, world, [LAYOUTS[n][1] for n in names], CASES)
    for rank_histories in found:
        for name, histories in zip(names, rank_histories, strict=True):
            for case, history, truth in zip(CASES, histories, one_process, strict=True):
                for (loss, norm), (true_loss, true_norm) in zip(history, truth, strict=True):
                    assert loss == pytest.approx(true_loss, rel=1e-5), (name, case)
                    assert norm == pytest.approx(true_norm, rel=1e-5), (name, case)


def test_training_learns(one_process: list[list[tuple[float, float]]]) -> None:
    """The witness itself moves: equal constants would prove nothing."""
    losses = [loss for loss, _ in one_process[0]]
    assert len(set(losses)) == STEPS
