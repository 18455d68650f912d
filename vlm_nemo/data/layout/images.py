"""From an image's size to its plan, whatever the layout; and what the planner asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from vlm_nemo.data.layout.anyres import plan_anyres, plan_without_tiles
from vlm_nemo.data.layout.native import plan_native
from vlm_nemo.data.layout.plan import NAME, ImagePlan, plain
from vlm_nemo.data.layout.rows import plan_rows
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.layout.square import plan_square
from vlm_nemo.data.layout.tiles import plan_canvas, plan_ovis, plan_tiles
from vlm_nemo.types import UserError

TYPICAL = (640, 480)
"""Width and height of the image by which layouts are told apart."""
LAYOUTS: dict[str, Callable[[ImageSpec, tuple[int, int]], ImagePlan]] = {
    "square": plan_square,
    "anyres": plan_anyres,
    "tiles": plan_tiles,
    "canvas": plan_canvas,
    "ovis": plan_ovis,
    "rows": plan_rows,
    "native": plan_native,
}


def plan_sizes(spec: ImageSpec, sizes: Sequence[tuple[int, int]]) -> list[ImagePlan]:
    """What becomes of the images of one conversation, (width, height) pixels each. Raises UserError."""
    return [plan_image(spec, size, len(sizes) == 1) for size in sizes]


@lru_cache(maxsize=4096)
def plan_image(spec: ImageSpec, size: tuple[int, int], alone: bool = True) -> ImagePlan:
    """What becomes of an image of (width, height) pixels; alone: the only one of its conversation. Raises UserError."""
    if spec.layout.kind not in LAYOUTS:
        raise UserError(f"model.layout.kind={spec.layout.kind} is unknown; choose one of {', '.join(LAYOUTS)}")
    tiles = alone or not spec.layout.tiles_if_alone
    plan = LAYOUTS[spec.layout.kind](spec, size) if tiles else plan_without_tiles(spec, size)
    plan = replace(plan, before=spec.layout.before, after=spec.layout.after)
    return replace(plan, items=(), span=None, cross=True) if spec.cross_attention else plan


def vision_cost(spec: ImageSpec, sizes: Sequence[tuple[int, int]]) -> int:
    """Patches that the tower computes for the images of one conversation."""
    if spec.tiles is not None:  # as many for every image, the empty tiles too
        return len(sizes) * spec.tiles * spec.grid[0] * spec.grid[1]
    return sum(plan.cost for plan in plan_sizes(spec, sizes))


def count_tokens(spec: ImageSpec, sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens that stand for the images of one conversation, as if each text between special tokens were one.

    So it is with the families' tokenizers; `vlm_nemo.data.pieces.image_tokens` counts with the tokenizer itself.
    """
    return sum(_tokens(plan) for plan in plan_sizes(spec, sizes))


def _tokens(plan: ImagePlan) -> int:
    if plan.cross:
        return 1
    return sum(
        len(NAME.findall(item)) + sum(1 for text in NAME.split(item) if text)
        if isinstance(item, str)
        else len(item.sources)
        for item in plan.items
    )


def tokens_said(spec: ImageSpec) -> str:
    """What an image takes, for people: "576 tokens an image"."""
    tokens = count_tokens(spec, [TYPICAL])
    return f"{tokens} tokens an image" + (f" of {TYPICAL[0]} x {TYPICAL[1]}" if spec.layout.kind != "square" else "")


def absent(before: str, after: str) -> ImagePlan:
    """An image whose own tokens are not counted: only the text that joins the text around it."""
    return plain(0, before, after)
