"""Which tokens look at which features where the decoder has cross-attention layers. Pure.

A token sees the image before it in its own sample, up to the next one; images whose tokens are neighbours are seen
together. With images of 2 and 3 features at tokens 1 and 4 of a sample of 6:

    tokens     a  [A]  b  c  [B]  d
    features   -  AA  AA AA  BBB BBB

Tokens in front of a sample's first image attend to all of its images, but their MLP adds nothing: so transformers'
Mllama does it, and the published weights know nothing else. Samples without images pass such layers unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Look = tuple[int, int, int, int]
"""Tokens [start, stop) attend to features [first, last)."""


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


def make_looks(bounds: Sequence[int], slots: Sequence[int], features: Sequence[int]) -> Looks:
    """bounds: where samples begin and the last ends, [0, …, T]; slots: each image's token; features: of each image."""
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
            ranges.append((start, slots[first], offsets[first], offsets[image]))
        seen[slots[first] : stop] = True
        together = first
        for i in range(first, image):
            if i > first and slots[i] != slots[i - 1] + 1:
                together = i
            until = slots[i + 1] if i + 1 < image else stop
            ranges.append((slots[i], until, offsets[together], offsets[i + 1]))
    return Looks(ranges=tuple(ranges), seen=seen)
