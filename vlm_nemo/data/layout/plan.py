"""What becomes of one image: how its pixels are cut, and what stands for it in the text. No layout of its own here.

    bytes -> canvases (the image resized, once or several times) -> views, row by row from each -> patches

A plan follows from the image's size alone, so rows are planned before anything is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Shares = NDArray[np.float32]
Sources = tuple[Ints, Shares | None]
"""[M] and None, or [M, 4] and as many shares."""
_NONE: Ints = np.zeros(0, dtype=np.int64)
_WHOLE: Shares = np.array([1, 0, 0, 0], dtype=np.float32)
Size = tuple[int, int]
"""(height, width), pixels; only an image's own size is (width, height), as its file says it."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """One copy of the image, resized, put on a canvas, and cut into views row by row."""

    steps: tuple[Size, ...]
    """Sizes that it is resized to, one after the other; () = it is padded to a square first (see `padded`)."""
    size: Size
    """Of the canvas."""
    view: Size
    """Of every view: divides the canvas."""
    corner: Size = (0, 0)
    """Where the image's upper left corner lies; negative: that much is cut off (CLIP's centre crop)."""
    colour: tuple[int, int, int] = (0, 0, 0)
    """Of the rest of the canvas."""
    padded: bool = False
    """LLaVA-1.5's way: padded to a square of that colour, then resized."""

    @property
    def views(self) -> int:
        return (self.size[0] // self.view[0]) * (self.size[1] // self.view[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Placeholders:
    """A run of tokens whose embeddings are replaced."""

    sources: Ints
    """[n], or [n, 4] with shares: counted from the image's first embedding; -1 - k: the projector's extra row k."""
    shares: Shares | None = None
    """[n, 4]: how much of each; None = all of one."""
    token: str = ""
    """Name of the special token that stands there; "" = the tokenizer's image token."""


NAME = re.compile(r"(?<!<)<[^<>\s]+>(?!>)")
"""What looks like a special token in a text of ours (a template, a layout), and so must be one."""
Item = str | Placeholders
"""A piece of what stands for an image: text of the layout, in which special tokens stand by name, or placeholders."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePlan:
    """One image, in pixels and in tokens."""

    canvases: tuple[Canvas, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()
    """Rows and columns of patches of every view, in the order of the canvases."""
    embeddings: int = 0
    """That all views give."""
    items: tuple[Item, ...] = ()
    before: str = ""
    """Joins the text before the image, and is tokenised with it."""
    after: str = ""
    """Joins the text behind it."""
    span: tuple[int, int] | None = None
    """Rows and columns of placeholders, where M-RoPE counts them; None = they are counted as text."""
    cross: bool = False
    """The decoder looks at the image from here on; its one token keeps its own embedding."""
    tiling: tuple[int, int] | None = None
    """Rows and columns of tiles, where the tower tells arrangements apart."""

    @property
    def sources(self) -> Sources:
        """[M] or [M, 4], and then shares: of all placeholders, one after the other."""
        return side_by_side([(item.sources, item.shares) for item in self.items if not isinstance(item, str)])

    def stands_like(self, other: ImagePlan) -> bool:
        """Whether both have the same tokens, views and embeddings; their pixels may be cut in other ways."""
        return (
            self is other
            or self.grids == other.grids
            and self.tiling == other.tiling
            and len(self.items) == len(other.items)
            and all(_alike(a, b) for a, b in zip(self.items, other.items, strict=True))
        )

    @property
    def cost(self) -> int:
        """Patches that the tower computes."""
        return sum(rows * columns for rows, columns in self.grids)


def _alike(one: Item, other: Item) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if one.token != other.token or not np.array_equal(one.sources, other.sources):
        return False
    return one.shares is other.shares is None or np.array_equal(one.shares, other.shares)  # type: ignore[arg-type]


def run(start: int, end: int) -> Placeholders:
    """(2, 5) -> placeholders of embeddings 2, 3, 4."""
    return Placeholders(sources=np.arange(start, end, dtype=np.int64))


def plain(count: int, before: str = "", after: str = "") -> ImagePlan:
    """Placeholders alone, without pixels: what a layout looks like to the text."""
    return ImagePlan(items=(run(0, count),) if count else (), embeddings=count, before=before, after=after)


def side_by_side(parts: Sequence[Sources]) -> Sources:
    """One after the other; where any of them has shares, the others get [1, 0, 0, 0]."""
    if all(shares is None for _, shares in parts):
        return np.concatenate([_NONE, *(sources for sources, _ in parts)]), None
    wide = [(np.tile(s[:, None], 4), np.tile(_WHOLE, (len(s), 1))) if h is None else (s, h) for s, h in parts]
    return np.concatenate([s for s, _ in wide]), np.concatenate([h for _, h in wide])


def offset(parts: Sequence[Sources], embeddings: Sequence[int]) -> Sources:
    """Sources of images side by side: each one's embeddings follow on those before it.

    ([[0, -1, 1], [0, 1]], [2, 2]) -> [0 -1 1 2 3]
    """
    starts = np.cumsum([0, *embeddings])
    moved = [(np.where(s >= 0, s + start, s), h) for (s, h), start in zip(parts, starts, strict=False)]
    return side_by_side(moved)
