"""A tower that is whole on every tensor rank, its images shared out, trains like one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import compositions, tiny
from tests.compositions import Composition
from tests.parallel.alike import STAGE1, STAGE2, Task, assert_alike
from tests.parallel.test_stages import looking, looking_rows
from tests.ranks import run_ranks
from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import Share, dealt, gathered, share_views, uneven
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import PackedBatch

TWENTY = 20


def uneven_rows(step: int) -> list[PackedBatch]:
    """Of four micro-batches one has twenty images, one has one, two have none."""
    seed = 100 * step
    many = tiny.sample(seed, 10 + 5 * TWENTY, TWENTY)
    return [
        tiny.row([many, tiny.sample(seed + 1, 8, 0)], 128),
        tiny.row([tiny.sample(seed + 2, 40, 0), tiny.sample(seed + 3, 30, 0)], 128),
        tiny.row([tiny.sample(seed + 4, 20, 1), tiny.sample(seed + 5, 30, 0)], 128),
        tiny.row([tiny.sample(seed + 6, 100, 0)], 128),
    ]


def drawn_rows(cfg: ModelConfig, step: int) -> list[PackedBatch]:
    return compositions.rows(cfg, 4, 1000 * step, capacity=192)


def text_rows(step: int) -> list[PackedBatch]:
    return [tiny.row([tiny.sample(10 * step + i, 30, 0)], 48) for i in range(2)]


def composed(rates: dict[str, float] | None = None, **parts: str) -> Task:
    base = dict(tower="siglip", reduction="none", projector="mlp", language="llama")
    cfg = Composition(**(base | parts)).config()  # type: ignore[arg-type]
    return Task(model=cfg, rows=partial(drawn_rows, cfg), **({} if rates is None else {"rates": rates}))


TASKS = {
    "twenty": Task(model=tiny.tiny_model(), rows=uneven_rows),
    "twenty, stage 1, tied": Task(model=tiny.tiny_model(tied_embeddings=True), rows=uneven_rows, rates=STAGE1),
    "text only": Task(model=tiny.tiny_model(), rows=text_rows, rates=STAGE2, silent=("projector",)),
    "looking": Task(model=looking(4), rows=looking_rows),
    "newline": composed(layout="anyres", projector="mlp_newline"),
    "words": composed(layout="ovis", tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary"),
    "native": composed(layout="native", tower="qwen25_vit", reduction="merge", language="qwen2_vl"),
    "queries": composed(tower="intern_vit_6b", projector="qformer"),
    "tiles": composed(layout="canvas", tower="llama32", projector="cross_attention"),
    "perceiver": composed(tower="clip_class_token", projector="perceiver", language="gemma3"),
}
SHARED = dict(tensor=2, vision=1)
FEW = [
    ("twenty", SHARED | dict(sequence=True)),
    ("twenty, stage 1, tied", SHARED),
    ("text only", SHARED),
    ("twenty", dict(context=2)),
    ("words", SHARED),
    ("native", SHARED | dict(sequence=True)),
]
CASES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "few": (2, FEW),
    "two": (
        2,
        [
            ("looking", SHARED | dict(sequence=True)),
            ("newline", SHARED | dict(sequence=True)),
            ("tiles", SHARED),
            ("words", SHARED | dict(sequence=True)),
            ("native", SHARED),
            ("queries", SHARED),
            ("perceiver", SHARED | dict(sequence=True)),
        ],
    ),
    "four": (
        4,
        [
            ("twenty", dict(tensor=4, vision=1, sequence=True)),
            ("twenty", SHARED | dict(pipeline=2, sequence=True)),
            ("twenty, stage 1, tied", SHARED | dict(pipeline=2, virtual=2)),
            ("newline", SHARED | dict(distributed_optimizer=True)),
            ("words", SHARED | dict(distributed_optimizer=True, sequence=True)),
            ("queries", SHARED | dict(pipeline=2)),
            ("perceiver", SHARED | dict(pipeline=2, distributed_optimizer=True)),
            ("native", dict(tensor=4, vision=1, recompute="full")),
            ("native", SHARED | dict(context=2, sequence=True)),
            ("newline", SHARED | dict(context=2, distributed_optimizer=True)),
            ("words", dict(context=2, pipeline=2)),
            ("looking", SHARED | dict(pipeline=2, layers=[1, 3])),
        ],
    ),
}


@pytest.mark.parametrize("which", ["few", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four"))])
def test_shared_images_train_like_one_process(which: str, tmp_path: Path) -> None:
    world, cases = CASES[which]
    assert_alike(TASKS, cases, world, tmp_path)


def test_images_are_dealt_by_cost() -> None:
    assert dealt([9, 1, 5, 5], 2) == [[0, 1], [2, 3]]
    assert dealt([3], 3) == [[0], [], []]
    assert dealt([], 2) == [[], []]
    cfg = tiny.tiny_model()
    assert uneven(cfg, [[(2, 2)] * 4], 4) == 1.0
    assert uneven(cfg, [[(2, 2)] * 5], 4) == pytest.approx(2 * 4 / 5)
    assert uneven(cfg, [[(2, 2)], [(2, 2)]], 4) == 4.0
    assert uneven(cfg, [[]], 4) == 1.0


@pytest.mark.parametrize(("count", "ranks"), [(20, 3), (2, 4), (1, 2)])
def test_every_view_is_taken_once_and_finds_its_place(count: int, ranks: int) -> None:
    """The rows that the ranks would hand in, side by side: put in order they are the whole row's."""
    cfg = Composition(tower="qwen2_vit", reduction="merge", projector="mlp", language="llama", layout="native").config()
    grids = [((2, 4, 6)[i % 3], (4, 2)[i % 2]) for i in range(count)]
    sizes = [h * w for h, w in grids]
    patches = torch.arange(sum(sizes))[:, None].expand(-1, 192).contiguous()
    whole = torch.cat([torch.full((view_tokens(spec_of(cfg), grid),), i) for i, grid in enumerate(grids)])
    handed = []
    for rank in range(ranks):
        own, share = share_views(patches, torch.tensor(grids), cfg, (rank, ranks))
        assert len(own.patches) == sum(h * w for h, w in own.grids)
        numbers = np.searchsorted(np.cumsum(sizes), own.patches[:, 0].numpy(), side="right")
        seen = list(dict.fromkeys(numbers.tolist()))
        rows = [i for i in seen for _ in range(view_tokens(spec_of(cfg), grids[i]))] if rank < count else []
        handed += rows + [-1] * (share.most - len(rows))
    assert torch.tensor(handed)[share.order].tolist() == whole.tolist()


def sums() -> list[tuple[list[float], list[float]]]:
    """What the gather gives, and the gradient of a rank's own rows: over two tensor ranks, then two context ranks."""
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        found = []
        for parallel in (ParallelConfig(tensor=2), ParallelConfig(context=2)):
            rank = groups.lay_out(parallel, seed=0).rank
            rows = torch.full((2 - rank, 1), 1.0 + rank, requires_grad=True)
            share = Share(most=2, order=torch.tensor([0, 2, 1]))
            out = gathered(rows, share, alike=parallel.context == 1)
            weights = torch.tensor([1.0, 10.0, 100.0])[:, None]
            (out * weights * (1 if parallel.context == 1 else 1 + rank)).sum().backward()
            found.append((out.flatten().tolist(), rows.grad.flatten().tolist()))
        groups.stop()
    return found


def test_gradients_of_gathered_rows() -> None:
    """Tensor ranks: each one's part of what all know, times the ranks, because parameters are averaged over them.
    Context ranks: the sum of what each knows."""
    first, second = run_ranks(sums, 2)
    assert first == [([1, 2, 1], [2, 200]), ([1, 2, 1], [3, 300])]
    assert second == [([1, 2, 1], [20]), ([1, 2, 1], [30])]
