"""Rows that are hardly there (no label, mostly padding, a few tokens; a step without images) train like one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.parallel.alike import STAGE1, Task, assert_alike
from vlm_nemo.model.config import MoeConfig
from vlm_nemo.types import IGNORE_INDEX, PackedBatch

SHARED = MoeConfig(
    experts=4, ffn_hidden_size=24, shared_ffn_hidden_size=16, dense_layers=[0], aux_loss=0.1, z_loss=0.01
)


def blind(row: PackedBatch) -> PackedBatch:
    return replace(row, labels=torch.full_like(row.labels, IGNORE_INDEX))


def odd_rows(step: int) -> list[PackedBatch]:
    """Two of four micro-batches have no label, so where two ranks have two each, one of each; one is mostly padding."""
    seed = 100 * step
    if step == 2:
        return [tiny.row([tiny.sample(seed + i, 20, 0)], 48) for i in range(4)]
    return [
        tiny.row([tiny.sample(seed, 12, 2)], 48),
        blind(tiny.row([tiny.sample(seed + 1, 30, 1), tiny.sample(seed + 2, 9, 0)], 48)),
        blind(tiny.row([tiny.sample(seed + 3, 20, 0)], 48)),
        tiny.row([tiny.sample(seed + 4, 6, 1), tiny.sample(seed + 5, 5, 0)], 48),
    ]


def short_rows(step: int) -> list[PackedBatch]:
    """Of eight tokens: over four context ranks a chunk is one of them. An image's own stand on several."""
    seed = 100 * step
    rows = [tiny.row([tiny.sample(seed + 10 * i + n, 3 + n, 0) for n in range(2)], 8) for i in range(3)]
    return [*rows, tiny.row([tiny.sample(seed + 90, 8, 1)], 8)]


TASKS = {
    "odd": Task(model=tiny.tiny_model(), rows=odd_rows),
    "odd, stage 1, tied": Task(model=tiny.tiny_model(tied_embeddings=True), rows=odd_rows, rates=STAGE1),
    "odd, experts": Task(model=tiny.tiny_model(moe=SHARED), rows=odd_rows),
    "short": Task(model=tiny.tiny_model(), rows=short_rows),
    "short, experts": Task(model=tiny.tiny_model(moe=SHARED), rows=short_rows),
}
DIST = dict(distributed_optimizer=True)
CASES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "one": (2, [("odd, experts", dict(context=2, expert=2))]),
    "two": (
        2,
        [
            ("odd", dict(context=2)),
            ("odd, stage 1, tied", dict(pipeline=2, virtual=2, **DIST)),
            ("odd", dict(tensor=2, vision=1)),
            ("odd, experts", dict(expert=2, **DIST)),
            ("short", dict(context=2)),
            ("short, experts", dict(tensor=2, sequence=True, expert=2)),
        ],
    ),
    "four": (
        4,
        [
            ("odd", dict(context=2, tensor=2, vision=1)),
            ("odd", dict(pipeline=2, overlap_grad_reduce=True, overlap_param_gather=True, **DIST)),
            ("odd, experts", dict(tensor=2, pipeline=2, expert=2, **DIST)),
            ("odd, experts", dict(context=2, expert=4, **DIST)),
            ("short", dict(context=4)),
            ("short, experts", dict(context=2, tensor=2, sequence=True, expert=4)),
        ],
    ),
}


@pytest.mark.parametrize("which", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four"))])
def test_odd_rows_train_like_one_process(which: str, tmp_path: Path) -> None:
    world, cases = CASES[which]
    assert_alike(TASKS, cases, world, tmp_path)
