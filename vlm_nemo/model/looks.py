"""Which tokens look at which features where the decoder has cross-attention layers. Pure.

A token sees the image before it in its own sample, up to the next one; images whose tokens are neighbours are seen
together. With images of 2 and 3 features at tokens 1 and 4 of a sample of 6:

    tokens     a  [A]  b  c  [B]  d
    features   -  AA  AA AA  BBB BBB

Tokens in front of a sample's first image attend to all features of its images, those of tiles that only fill an image
up included, but their MLP adds nothing: so transformers' Mllama does it, and the published weights know nothing else.
Samples without images pass such layers unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Span = tuple[int, int]
"""Features [first, last)."""
Look = tuple[int, int, tuple[Span, ...]]
"""Tokens [start, stop) attend to these features."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Of a row of T tokens and E features."""

    ranges: tuple[Look, ...]
    """In the order of the tokens; those in none attend to nothing."""
    seen: Tensor
    """[T, 1, 1] bool: whether a token stands behind an image"""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Looks:
        """The same, every tensor through `move`."""
        return replace(self, seen=move(self.seen))


def make_looks(
    bounds: Sequence[int], slots: Sequence[int], features: Sequence[int], own: Sequence[int] | None = None
) -> Looks:
    """bounds: where samples begin and the last ends, [0, …, T]; slots: each image's token; features: of each image.

    own: the first so many of them, those that are not of tiles that fill an image up; None = all.
    """
    own = features if own is None else own
    offsets = [0]
    for count in features:
        offsets.append(offsets[-1] + count)
    ranges: list[Look] = []
    seen = torch.zeros(bounds[-1], 1, 1, dtype=torch.bool)
    image = 0
    for start, stop in zip(bounds, bounds[1:], strict=False):
        first = image
        while image < len(slots) and slots[image] < stop:
            image += 1
        if image == first:
            continue
        if slots[first] > start:
            ranges.append((start, slots[first], ((offsets[first], offsets[image]),)))
        seen[slots[first] : stop] = True
        together = first
        for i in range(first, image):
            if i > first and slots[i] != slots[i - 1] + 1:
                together = i
            until = slots[i + 1] if i + 1 < image else stop
            seen_now = [(offsets[n], offsets[n] + own[n]) for n in range(together, i + 1)]
            ranges.append((slots[i], until, _joined(seen_now)))
    return Looks(ranges=tuple(ranges), seen=seen)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """[(0, 2), (2, 5), (7, 8)] -> ((0, 5), (7, 8))"""
    found: list[Span] = []
    for first, last in spans:
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, last))
    return tuple(found)


def look_at(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """[E, …] -> those features, one behind the other."""
    if len(spans) == 1:
        return x[slice(*spans[0])]
    return torch.cat([x[first:last] for first, last in spans])
