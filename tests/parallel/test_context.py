"""Ranks that share a row along its length train like one process: losses, gradient norms and gradients of every part.

Images lie unevenly over the row: all on one rank's tokens, none at all, over the border between two ranks' tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import compositions, tiny
from tests.compositions import Composition
from tests.model import looking
from tests.parallel.alike import STAGE1, Task, assert_alike
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import PackedBatch


def tiny_rows(step: int) -> list[PackedBatch]:
    """Rows of 48 tokens: two ranks' are cut at 12, 24 and 36."""
    s = 100 * step
    return [
        tiny.row([tiny.sample(s, 17, 3), tiny.sample(s + 1, 30, 0)], 48),  # all images in the first chunks
        tiny.row([tiny.sample(s + 2, 48, 0)], 48),  # a sample over all chunks, no image
        tiny.row([tiny.sample(s + 3, 9, 0), tiny.sample(s + 4, 31, 2)], 48),  # an image of tokens 10 to 13
        tiny.row([tiny.sample(s + 5, 29, 0), tiny.sample(s + 6, 16, 2)], 48),  # all images in the last
    ]


def drawn_rows(cfg: ModelConfig, step: int) -> list[PackedBatch]:
    return compositions.rows(cfg, 4, 1000 * step, capacity=88)


def looking_rows(step: int) -> list[PackedBatch]:
    samples = looking.SAMPLES
    return [looking.row(chosen, 32) for chosen in (samples, samples[1:2], samples[::-1], samples[2:])]


def drawn(**parts: str) -> Task:
    cfg = Composition(**parts).config()
    return Task(model=cfg, rows=partial(drawn_rows, cfg))


TASKS = {
    "tiny": Task(model=tiny.tiny_model(), rows=tiny_rows),
    "stage 1": Task(model=tiny.tiny_model(), rows=tiny_rows, rates=STAGE1),
    "tied": Task(model=tiny.tiny_model(tied_embeddings=True), rows=tiny_rows),
    # Windows, and images that see themselves whole
    "gemma": drawn(tower="siglip", reduction="none", projector="gemma", language="gemma3"),
    # Three positions a token
    "qwen": drawn(tower="qwen25_vit", reduction="merge", projector="mlp", language="qwen2_vl", layout="native"),
    "looking": Task(model=looking.looking_model(), rows=looking_rows),
}
CASES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "two": (
        2,
        [
            ("stage 1", dict(context=2)),
            ("gemma", dict(context=2)),
            ("looking", dict(context=2)),
            ("tiny", dict(context=2, recompute="full", distributed_optimizer=True)),
        ],
    ),
    "four": (
        4,
        [
            ("tiny", dict(context=2, tensor=2, sequence=True)),
            ("tied", dict(context=2, pipeline=2)),
            ("qwen", dict(context=2, distributed_optimizer=True)),
        ],
    ),
}
LAYOUTS: list[dict[str, Any]] = [
    dict(context=2),
    dict(context=4),
    dict(context=2, tensor=2, sequence=True),
    dict(context=2, tensor=2, vision=1, recompute="full"),
    dict(context=2, pipeline=2),
    dict(context=2, pipeline=2, virtual=2),
    dict(context=2, distributed_optimizer=True),
]


@pytest.mark.parametrize("which", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_shared_rows_train_like_one_process(which: str, tmp_path: Path) -> None:
    world, cases = CASES[which]
    assert_alike(TASKS, cases, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_model_at_every_layout(layout: dict[str, Any], tmp_path: Path) -> None:
    names = [name for name in TASKS if name != "looking" or "virtual" not in layout]
    assert_alike(TASKS, [(name, layout) for name in names], 2 if layout == LAYOUTS[0] else 4, tmp_path)


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_borders_cut_images(name: str) -> None:
    """What the rows above are made for."""
    cut = 0
    for row in TASKS[name].rows(1):
        slots = row.images.slots.tolist()
        starts = [i for i, slot in enumerate(slots) if slot - 1 not in slots]
        runs = [set(slots[a:b]) for a, b in zip(starts, [*starts, len(slots)][1:], strict=True)]
        batch = model_batch(row, TASKS[name].model, image_token=tiny.IMAGE, device=torch.device("cpu"), context=(0, 2))
        assert batch.segments.reach is not None
        held = set(batch.segments.reach.order[: len(row.tokens) // 2].tolist())
        cut += sum(0 < len(held & run) < len(run) for run in runs)
    assert cut
