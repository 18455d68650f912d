"""Every layout trains like one process: loss and gradient norm over 5 optimizer steps, three ways of freezing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests import tiny
from tests.ranks import run_ranks
from vlm_nemo.runtime.config import ParallelConfig
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
CASES = {**{frozen: (frozen, False) for frozen in FROZEN}, "tied": ("none", True)}
"""What is frozen, and whether the embeddings are the head too."""
SOME = {
    "tp2": ["none", "stage1"],
    "tp2_sp": ["stage2", "tied"],
    "tp2_recompute": ["stage2"],
    "pp2": ["none", "tied"],
    "pp2_vpp2": ["stage1", "tied"],
    "dp2": ["none"],
    "dp2_distopt": ["stage1", "stage2"],
    "tp4": ["none"],
    "tp2_pp2": ["stage2", "tied"],
}
"""Every layout, every case over tensor ranks and over stages; the slow test has all of them together."""


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


def train_all(pairs: list[tuple[dict[str, object], str]]) -> list[list[tuple[float, float]]]:
    """Of each layout and case."""
    return [train(ParallelConfig(**layout), *CASES[case]) for layout, case in pairs]  # type: ignore[arg-type]


def train_compiled(pairs: list[tuple[dict[str, object], str]]) -> list[list[tuple[float, float]]]:
    from vlm_nemo.runtime.fusion import compiled

    with compiled("always"):
        return train_all(pairs)


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[tuple[float, float]]]:
    alone = dict(distributed_optimizer=False)
    return dict(zip(CASES, run_ranks(train_all, 1, [(alone, case) for case in CASES])[0], strict=True))


def compare(
    pairs: list[tuple[str, str]],
    world: int,
    truths: dict[str, list[tuple[float, float]]],
    train: Callable[..., list[list[tuple[float, float]]]] = train_all,
) -> None:
    for rank in run_ranks(train, world, [(LAYOUTS[name][1], case) for name, case in pairs]):
        for (name, case), history in zip(pairs, rank, strict=True):
            for (loss, norm), (true_loss, true_norm) in zip(history, truths[case], strict=True):
                assert loss == pytest.approx(true_loss, rel=1e-5), (name, case)
                assert norm == pytest.approx(true_norm, rel=1e-5), (name, case)


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_one_process(world: int, one_process: dict[str, list[tuple[float, float]]]) -> None:
    compare([(name, case) for name in of_size(world) for case in SOME[name]], world, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_in_every_case(world: int, one_process: dict[str, list[tuple[float, float]]]) -> None:
    compare(list(itertools.product(of_size(world), CASES)), world, one_process)


@pytest.mark.slow
def test_compiled_layouts_equal_one_process_that_is_not(one_process: dict[str, list[tuple[float, float]]]) -> None:
    compare([("tp2_sp", "tied"), ("tp2_recompute", "none"), ("pp2_vpp2", "stage1")], 2, one_process, train_compiled)


def of_size(world: int) -> list[str]:
    return [name for name, (size, _) in LAYOUTS.items() if size == world]


def test_training_learns(one_process: dict[str, list[tuple[float, float]]]) -> None:
    """The witness itself moves: equal constants would prove nothing."""
    losses = [loss for loss, _ in one_process["none"]]
    assert len(set(losses)) == STEPS
