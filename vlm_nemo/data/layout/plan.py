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
_NONE: Ints = np.zeros(0, dtype=np.int64)
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
    """Counted from the image's first embedding; -1 - k: the projector's extra row k."""
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

    @property
    def sources(self) -> Ints:
        """[M]: of all placeholders, one after the other."""
        return np.concatenate([_NONE, *(item.sources for item in self.items if not isinstance(item, str))])

    def stands_like(self, other: ImagePlan) -> bool:
        """Whether both have the same tokens, views and embeddings; their pixels may be cut in other ways."""
        return (
            self is other
            or self.grids == other.grids
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
    return one.token == other.token and np.array_equal(one.sources, other.sources)


def run(start: int, end: int) -> Placeholders:
    """(2, 5) -> placeholders of embeddings 2, 3, 4."""
    return Placeholders(sources=np.arange(start, end, dtype=np.int64))


def plain(count: int, before: str = "", after: str = "") -> ImagePlan:
    """Placeholders alone, without pixels: what a layout looks like to the text."""
    return ImagePlan(items=(run(0, count),) if count else (), embeddings=count, before=before, after=after)


def offset(sources: Sequence[Ints], embeddings: Sequence[int]) -> Ints:
    """Sources of images side by side: each one's embeddings follow on those before it.

    ([[0, -1, 1], [0, 1]], [2, 2]) -> [0 -1 1 2 3]
    """
    if not sources:
        return _NONE
    starts = np.cumsum([0, *embeddings[:-1]])
    return np.concatenate([np.where(s >= 0, s + start, s) for s, start in zip(sources, starts, strict=True)])
