"""Experts spread over ranks train like one process: losses, gradients by module, checkpoints from layout to layout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from vlm_nemo.check.trial import compared, gather_gradients, written
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import checkpoint, optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch

STEPS, ROWS = 5, 4
ALL = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2, weight_decay=0.1)
STAGE1 = OptimConfig(projector_lr=2e-2)
SHARED = MoeConfig(
    experts=4,
    ffn_hidden_size=24,
    shared_ffn_hidden_size=16,
    shared_gate=True,
    dense_layers=[0],
    aux_loss=0.1,
    z_loss=0.01,
)
LATE = MoeConfig(experts=4, norm_top_k=False, dense_layers=[0, 1], aux_loss=0.1)
"""No experts on the first of two stages."""
Layout = dict[str, object]
PLAIN: Layout = dict(distributed_optimizer=False)
Step = tuple[float, float, float, float]
"""Loss, gradient norm, balance loss and z loss."""

TWO: list[Layout] = [
    dict(tensor=2, sequence=True, expert=2, recompute="full", **PLAIN),
    dict(pipeline=2, recompute="selective", **PLAIN),
    dict(context=2, expert=2, **PLAIN),
    dict(pipeline=2, virtual=2, recompute="full", **PLAIN),
]
OTHER_TWO: list[Layout] = [
    dict(tensor=2, **PLAIN),
    dict(tensor=2, expert=2, **PLAIN),
    dict(expert=2, **PLAIN),
    dict(expert=2),
]
"""Whose losses and norms the checkpoints' test has too: experts cut over tensor ranks, spread over data ranks."""
FOUR: list[Layout] = [
    dict(tensor=2, sequence=True, expert=2, overlap_grad_reduce=True, overlap_param_gather=True),
    dict(tensor=2, expert=4, **PLAIN),
    dict(context=2, tensor=2, sequence=True, expert=4, **PLAIN),
    dict(expert=2),
    dict(pipeline=2, expert=2, **PLAIN),
]


def model(moe: MoeConfig = SHARED) -> ModelConfig:
    return tiny.tiny_model(moe=moe)


def rows(number: int, length: int = 48) -> list[PackedBatch]:
    """Of step `number`; the second has no image, and so has every row of the third step."""
    if number == 3:
        return [tiny.row([tiny.sample(300 + i, 20, 0), tiny.sample(400 + i, 9 + i, 0)], length) for i in range(ROWS)]
    return tiny.rows(ROWS, length, seed=100 * number)


class Run:
    """A model in training under a layout."""

    def __init__(self, cfg: ModelConfig, rates: OptimConfig, layout: Layout, seed: int = 0) -> None:
        self.cfg, self.rates, self.parallel = cfg, rates, ParallelConfig(**layout)  # type: ignore[arg-type]
        self.ranks = groups.lay_out(self.parallel, seed=0)
        self.chunks = build_model(cfg, self.parallel, "fp32", seed)
        optim.freeze(self.chunks, optim.part_rates(rates))
        self.model = optim.wrap(self.chunks, self.parallel)
        self.optimizer = optim.build_optimizer(rates, self.parallel, "fp32", self.model)
        step.prepare_model(self.model)

    def step(self, number: int, batch: Sequence[PackedBatch] | None = None, *, spoilt: bool = False) -> Step:
        """As the whole job sees it. spoilt: it is to be skipped."""
        mine = (rows(number) if batch is None else batch)[self.ranks.data_rank :: self.ranks.data]
        where = device.device()
        context = (self.ranks.context_rank, self.ranks.context)
        batches = [model_batch(r, self.cfg, image_token=tiny.IMAGE, device=where, context=context) for r in mine]
        optim.set_rates(self.optimizer, self.rates, number, STEPS)
        clip = 0.0 if number == 1 else self.rates.clip_grad  # the first step's gradients are compared as they are
        found = step.train_step(self.model, self.optimizer, batches, clip)
        speaks = self.ranks.last_stage and self.ranks.tensor_rank == 0
        loss, count, *routers = groups.sum_over(
            [found.loss_sum * speaks, found.loss_tokens * speaks, *found.router_losses]
        )
        assert found.applied is not spoilt
        return loss / count, found.grad_norm, routers[0] / count, routers[1] / count


CASES = {"all": (SHARED, ALL, 48), "stage 1": (SHARED, STAGE1, 48), "late": (LATE, ALL, 48), "odd": (SHARED, ALL, 41)}
"""Rows of 41 tokens do not come out even over tensor ranks."""
EVEN = ["all", "stage 1", "late"]
SOME = [["all", "stage 1"], ["all", "late"], ["all"], ["late", "stage 1"]]
"""Of TWO: every layout, every case over tensor ranks or stages; the slow tests have all of them together."""


def histories(pairs: Sequence[tuple[Layout, str]], folder: str) -> list[tuple[list[Step], dict[str, float]]]:
    """Of a layout and a case: five steps, and by module the largest gradient of the first (of one process, which leaves
    them in `folder`), or the largest difference from it."""
    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for layout, case in pairs:
            moe, rates, length = CASES[case]
            run, witness = Run(model(moe), rates, layout), Path(folder) / f"{case}.safetensors"
            history = [run.step(1, rows(1, length))]
            gather_gradients(run.model)
            modules = compared(run.chunks, witness) if witness.exists() else written(run.chunks, witness)
            found.append((history + [run.step(n, rows(n, length)) for n in range(2, STEPS + 1)], modules))
        groups.stop()
    return found


def some() -> list[tuple[Layout, str]]:
    pairs = [(layout, case) for layout, cases in zip(TWO, SOME, strict=True) for case in cases]
    return [*pairs, (dict(tensor=2, **PLAIN), "odd")]


@pytest.mark.parametrize(
    ("world", "pairs"),
    [
        pytest.param(2, some(), id="two ranks"),
        pytest.param(2, list(product(TWO, EVEN)), id="two ranks, every case", marks=pytest.mark.slow),
        pytest.param(2, list(product(OTHER_TWO, EVEN)), id="two ranks, other layouts", marks=pytest.mark.slow),
        pytest.param(4, list(product(FOUR, EVEN)), id="four ranks", marks=pytest.mark.slow),
    ],
)
def test_layouts_equal_one_process(world: int, pairs: list[tuple[Layout, str]]) -> None:
    """Rows with and without images, a step without any, frozen parts, recomputation, a stage without experts."""
    with tempfile.TemporaryDirectory() as folder:
        truths = dict(zip(CASES, run_ranks(histories, 1, [(PLAIN, case) for case in CASES], folder)[0], strict=True))
        ranks = run_ranks(histories, world, pairs, folder)
    for rank in ranks:
        for (layout, case), (history, off) in zip(pairs, rank, strict=True):
            truth, largest = truths[case]
            for found, true in zip(history, truth, strict=True):
                assert found == pytest.approx(true, rel=1e-5), (layout, case)
            assert all(off[name] <= 1e-4 * largest[name] for name in off), (layout, case, off)
    for history, _ in truths.values():
        assert len({loss for loss, *_ in history}) == STEPS, "the witness itself must move"
    learns, frozen, *_ = (history for history, _ in truths.values())
    assert all(balance > 3 for _, _, balance, _ in learns), "three sparse layers, each at least 1"
    assert all((balance, z) == (0, 0) for _, _, balance, z in frozen), "a frozen router has no such loss"


def moved(first: Layout, second: Layout, folder: str) -> list[Step]:
    """Two steps under one layout, a checkpoint, two under another, which started from other weights."""
    run = Run(model(), ALL, first)
    history = [run.step(n) for n in (1, 2)]
    saved = checkpoint.save(
        Path(folder),
        2,
        ranks=run.ranks,
        chunks=run.chunks,
        optimizer=run.optimizer,
        state={"updates": 2},
        write_extras=lambda path: None,
        keep=0,
    )
    run = Run(model(), ALL, second, seed=7)
    checkpoint.load_weights(saved, run.chunks)
    checkpoint.load_optimizer(saved, run.chunks, run.optimizer, 2)
    return history + [run.step(n) for n in (3, 4)]


def both_ways(pairs: Sequence[tuple[Layout, Layout]], folder: str) -> list[list[Step]]:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        found = [moved(*pair, f"{folder}/{number}") for number, pair in enumerate(pairs)]
        groups.stop()
    return found


def test_a_checkpoint_of_spread_experts_goes_on_at_any_layout(tmp_path: Path) -> None:
    """Experts over data ranks, over tensor ranks, cut over tensor ranks: the optimizer comes along."""
    over_data, over_tensor, cut = dict(expert=2), dict(tensor=2, sequence=True, expert=2, **PLAIN), dict(tensor=2)
    pairs = [(over_data, cut), (cut, over_tensor), (over_tensor, over_data)]
    (truth,) = run_ranks(both_ways, 1, [(PLAIN, PLAIN)], str(tmp_path / "alone"))[0]
    for rank in run_ranks(both_ways, 2, pairs, str(tmp_path / "two")):
        for history in rank:
            for found, true in zip(history, truth, strict=True):
                assert found == pytest.approx(true, rel=1e-5)


def spoilt_steps(layouts: Sequence[Layout]) -> list[tuple[bool, bool]]:
    """Of a step in which one expert of the last rank gets a gradient that is no number: whether this rank's norm is
    none either, and whether a weight of this rank moved."""
    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for layout in layouts:
            run = Run(model(), ALL, layout)
            run.step(1)
            parameters = [(name, p) for chunk in run.chunks for name, p in chunk.named_parameters()]
            before = [p.detach().clone() for _, p in parameters]
            expert = next(p for name, p in parameters if "local_experts" in name)
            factor = math.nan if run.ranks.rank == run.ranks.world - 1 else 1.0
            hook = expert.register_hook(lambda gradient, by=factor: gradient * by)
            _, norm, _, _ = run.step(2, spoilt=True)
            moved = any(not torch.equal(p, was) for (_, p), was in zip(parameters, before, strict=True))
            found.append((math.isnan(norm), moved))
            hook.remove()
            run.step(3)
        groups.stop()
    return found


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, [dict(expert=2), dict(tensor=2, expert=2, **PLAIN), dict(pipeline=2)]),
        pytest.param(
            4, [dict(tensor=2, pipeline=2, expert=2, **PLAIN), dict(expert=2)], id="four ranks", marks=pytest.mark.slow
        ),
    ],
)
def test_all_ranks_skip_a_step_that_one_expert_spoils(world: int, layouts: list[Layout]) -> None:
    """Ranks that hold nothing of it, too: other stages, other experts, other data."""
    for rank in run_ranks(spoilt_steps, world, layouts):
        assert rank == [(True, False)] * len(layouts)


def gradient_of(batches: Sequence[Sequence[PackedBatch]], folder: str) -> list[dict[str, float]]:
    """Of the same samples in other rows: the first leaves its gradients, the others' differences."""
    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for rows_of_it in batches:
            run, witness = Run(model(), ALL, PLAIN), Path(folder) / "rows.safetensors"
            run.step(1, rows_of_it)
            found.append(compared(run.chunks, witness) if witness.exists() else written(run.chunks, witness))
        groups.stop()
    return found


def test_no_packing_changes_a_gradient(tmp_path: Path) -> None:
    """The balance loss included: samples alone, in twos, all in one row, with more and with less padding."""
    samples = [tiny.sample(i, 10 + 3 * i, i % 3) for i in range(4)]
    alone = [tiny.row([sample], 48) for sample in samples]
    twos = [tiny.row(samples[i : i + 2], 64) for i in (0, 2)]
    together = [tiny.row(samples, 96)]
    largest, *others = run_ranks(gradient_of, 1, [alone, twos, together], str(tmp_path))[0]
    for off in others:
        assert all(off[name] <= 1e-5 * largest[name] for name in largest), off


def test_a_row_without_labels_is_told_how_many_there_were() -> None:
    """A stage that gets no labels weighs samples as the last one does."""
    whole = tiny.rows(1)[0]
    blind = replace(whole, labels=whole.labels * 0 - 100, segment_labels=whole.supervised_by_segment())
    assert blind.supervised_by_segment().tolist() == [5, 9, 3, 0]
    assert sum(blind.supervised_by_segment().tolist()) == whole.supervised
