"""Pipeline stages of different numbers of layers train like one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.model.looking import SAMPLES, looking_model, row
from tests.parallel.alike import STAGE1, STAGE2, Task, assert_alike
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import PackedBatch


def of(layers: int, **language: object) -> ModelConfig:
    model = tiny.tiny_model(**language)
    return replace(model, language=replace(model.language, num_layers=layers))


def rows(step: int) -> list[PackedBatch]:
    return tiny.rows(4, seed=100 * step)


def looking_rows(step: int) -> list[PackedBatch]:
    turned = SAMPLES[step % len(SAMPLES) :] + SAMPLES[: step % len(SAMPLES)]
    return [row(turned, 32), row(SAMPLES[1:2], 32), row(SAMPLES[::-1], 32), row(SAMPLES[2:], 32)]


def looking(layers: int) -> ModelConfig:
    model = looking_model()
    return replace(model, language=replace(model.language, num_layers=layers, cross_attention_layers=[1, layers - 1]))


GEMMA = dict(window=8, global_every=3, sandwich_norm=True, rope_local_base=1e4, rope_base=1e5)
TASKS = {
    "five": Task(model=of(5), rows=rows),
    "five, tied, local and global": Task(model=of(5, tied_embeddings=True, **GEMMA), rows=rows),
    "seven, stage 1": Task(model=of(7), rows=rows, rates=STAGE1),
    "seven, stage 2, tied": Task(model=of(7, tied_embeddings=True), rows=rows, rates=STAGE2),
    "seven, looking": Task(model=looking(7), rows=looking_rows),
}
FEW = [
    ("five, tied, local and global", dict(pipeline=2, virtual=2, layers=[1, 2, 1, 1])),
    ("seven, stage 2, tied", dict(pipeline=2, layers=[0, 7])),
]
CASES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "few": (2, FEW),
    "two": (
        2,
        [
            ("five", dict(pipeline=2, layers=[1, 4])),
            ("five, tied, local and global", dict(pipeline=2, layers=[4, 1])),
            ("seven, stage 1", dict(pipeline=2)),
            ("seven, stage 2, tied", dict(pipeline=2, virtual=2, layers=[1, 3, 1, 2])),
            ("seven, looking", dict(pipeline=2, layers=[0, 7])),
            ("five", dict(pipeline=2, layers=[0, 5], recompute="full")),
            ("five, tied, local and global", dict(pipeline=2, virtual=2, layers=[0, 2, 1, 2])),
        ],
    ),
    "four": (
        4,
        [
            ("five", dict(pipeline=4)),
            ("five, tied, local and global", dict(pipeline=4, layers=[1, 1, 2, 1])),
            ("seven, stage 1", dict(pipeline=4, layers=[1, 3, 2, 1])),
            ("seven, stage 2, tied", dict(pipeline=2, tensor=2, sequence=True, layers=[2, 5])),
            ("seven, stage 2, tied", dict(pipeline=2, virtual=2, layers=[1, 2, 1, 3], distributed_optimizer=True)),
            ("seven, looking", dict(pipeline=4, layers=[1, 2, 1, 3])),
            ("seven, stage 1", dict(pipeline=4, layers=[0, 3, 2, 2])),
        ],
    ),
}


@pytest.mark.parametrize("which", ["few", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four"))])
def test_uneven_stages_equal_one_process(which: str, tmp_path: Path) -> None:
    world, cases = CASES[which]
    assert_alike(TASKS, cases, world, tmp_path)
