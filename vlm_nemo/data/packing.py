"""Pack samples into rows of a fixed length. Pure: no files, no torch.distributed.

A pool holds the samples that wait. A row takes the oldest of them, then the subset of the others that fills the rest
best, found exactly: bit s of an integer says that some subset has sum s, and adding a sample of length n is
`reach |= reach << n`. With a pool of 64 a mix of lengths fills its rows to 100.00 %; the oldest always goes, so a
sample waits for at most as many rows as the pool has places.

A second budget may bound the vision tower's work for a row. Where the best filling breaks it, the same integer holds
one block of sums for every level of that work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_nemo.data.layout.plan import offset
from vlm_nemo.data.positions import cumulative, packed_positions
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch

_NONE = np.zeros(0, dtype=np.int64)
LEVELS = 32
"""Of vision cost at most; budgets that are more multiples of the costs' common divisor are rounded to so many."""


class Packer:
    """Chooses which of the waiting items share a row. Deterministic; items are ints that the caller understands."""

    def __init__(self, capacity: int, pool: int, vision_capacity: int | None = None) -> None:
        """capacity: tokens a row; pool: items to choose from; vision_capacity: vision cost a row, None = no limit."""
        if capacity < 1 or pool < 1:
            raise ValueError(f"capacity ({capacity}) and pool ({pool}) must be at least 1")
        self.capacity = capacity
        self.pool = pool
        self.vision_capacity = vision_capacity
        self._items: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[int]:
        """What waits, oldest first: all that is needed to go on from here."""
        return [item for item, _, _ in self._items]

    @property
    def full(self) -> bool:
        return len(self._items) >= self.pool

    def add(self, item: int, length: int, cost: int = 0) -> None:
        """Put an item of `length` tokens and `cost` vision patches into the pool."""
        if not 0 < length <= self.capacity:
            raise ValueError(f"item {item} has {length} tokens, a row holds 1 to {self.capacity}")
        if cost < 0 or (self.vision_capacity is not None and cost > self.vision_capacity):
            raise ValueError(f"item {item} costs {cost} patches, a row may cost {self.vision_capacity}")
        self._items.append((item, length, cost))

    def pop(self) -> list[int]:
        """Take one row out of the pool, oldest item first. Empty only if the pool is."""
        if not self._items:
            return []
        (oldest, length, cost), *others = self._items
        lengths, room = [n for _, n, _ in others], self.capacity - length
        if self.vision_capacity is None:
            taken = fill(lengths, room)
        else:
            taken = fill(lengths, room, [c for _, _, c in others], self.vision_capacity - cost)
        row = [oldest, *(others[i][0] for i in taken)]
        chosen = set(taken)
        self._items = [entry for i, entry in enumerate(others) if i not in chosen]
        return row


def fill(
    lengths: Sequence[int], room: int, costs: Sequence[int] | None = None, cost_room: int | None = None
) -> list[int]:
    """Indices, ascending, of a subset of `lengths` with the largest sum <= room; early ones preferred.

    ([5, 4, 3], 7) -> [1, 2]

    With costs and a cost_room: the largest sum among the subsets whose costs add up to at most cost_room. Exact where
    cost_room is at most LEVELS times the costs' common divisor (images of one size); else each cost is rounded up to
    a LEVELS-th of cost_room, so that the budget holds and a subset that just fits may be passed over.
    """
    taken = _fill(lengths, room)
    if costs is None or cost_room is None or sum(costs[i] for i in taken) <= cost_room:
        return taken
    return _fill_within(lengths, room, costs, cost_room)


def _fill(lengths: Sequence[int], room: int) -> list[int]:
    mask = (1 << (room + 1)) - 1
    reach = [1]
    for n in lengths:
        reach.append((reach[-1] | reach[-1] << n) & mask)
        if reach[-1] >> room:
            break
    return _walk_back(reach, reach[-1].bit_length() - 1, lengths)


def _fill_within(lengths: Sequence[int], room: int, costs: Sequence[int], cost_room: int) -> list[int]:
    """Bit `level * stride + sum`: some subset of that cost level has that sum. Between two blocks lies room for a sum
    that overflows, which the mask clears."""
    unit = math.gcd(*costs)
    if cost_room // unit <= LEVELS:
        levels, level_of = cost_room // unit, [cost // unit for cost in costs]
    else:
        levels, level_of = LEVELS, [-(-cost * LEVELS // cost_room) for cost in costs]
    # What cannot go in at all moves nothing: a step of 0 leaves `reach` as it was
    fits = [n <= room and level <= levels for n, level in zip(lengths, level_of, strict=True)]
    stride = room + 1 + max((n for n, fit in zip(lengths, fits, strict=True) if fit), default=0)
    steps = [level * stride + n if fit else 0 for n, level, fit in zip(lengths, level_of, fits, strict=True)]
    mask = _repeat((1 << (room + 1)) - 1, stride, levels + 1)
    brim = _repeat(1 << room, stride, levels + 1)
    reach = [1]
    for step in steps:
        reach.append((reach[-1] | reach[-1] << step) & mask)
        if reach[-1] & brim:
            break
    block = (1 << (room + 1)) - 1
    sums = [((reach[-1] >> level * stride) & block).bit_length() - 1 for level in range(levels + 1)]
    best = max(range(levels + 1), key=lambda level: sums[level])  # the lowest level of those with that sum
    return _walk_back(reach, best * stride + sums[best], steps)


def _walk_back(reach: Sequence[int], end: int, steps: Sequence[int]) -> list[int]:
    """Which steps lead from 0 to `end`; reach[i] has a bit for every place that the first i of them can lead to."""
    taken = []
    for i in range(len(reach) - 2, -1, -1):
        if not reach[i] >> end & 1:
            taken.append(i)
            end -= steps[i]
    return taken[::-1]


def _repeat(block: int, stride: int, times: int) -> int:
    """`times` copies of `block`, one every `stride` bits."""
    found, have = block, 1
    while have < times:
        found |= found << stride * min(have, times - have)
        have += min(have, times - have)
    return found


def share_out(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` groups of one size and nearly one cost: the dearest first, each to the cheapest
    group that has room. len(costs) is a multiple of parts; indices ascend within a group.

    ([9, 1, 5, 5], 2) -> [[0, 1], [2, 3]]
    """
    size = len(costs) // parts
    groups: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        part = min((p for p in range(parts) if len(groups[p]) < size), key=lambda p: (totals[p], len(groups[p])))
        groups[part].append(i)
        totals[part] += costs[i]
    return [sorted(group) for group in groups]


def pack_batch(samples: Sequence[EncodedSample], capacity: int, pad_id: int, patch: int) -> PackedBatch:
    """Lay samples side by side, padding last; see PackedBatch for the picture.

    Several rows are one batch too: hand in the samples of all of them and their capacity together. Samples never see
    each other, so it does not matter where one row ends.

    Labels are shifted here, inside each sample: a sample's last token predicts nothing. patch: side of a patch,
    pixels, needed when there are no images.
    """
    lengths = [len(sample.tokens) for sample in samples]
    used = sum(lengths)
    if used > capacity:
        raise ValueError(f"samples of {lengths} tokens do not fit a row of {capacity}")
    tokens: list[int] = []
    labels: list[int] = []
    for sample in samples:
        tokens += sample.tokens
        labels += sample.labels[1:]
        labels.append(IGNORE_INDEX)
    padding = capacity - used
    tokens += [pad_id] * padding
    labels += [IGNORE_INDEX] * padding
    segments = lengths + [padding] if padding else lengths
    images = join_images([sample.images for sample in samples], lengths, patch)
    return PackedBatch(
        tokens=torch.tensor(tokens),
        labels=torch.tensor(labels),
        positions=torch.from_numpy(packed_positions(segments, [sample.positions for sample in samples])),
        cu_seqlens=torch.from_numpy(cumulative(segments)),
        images=as_tensors(images),
        samples=len(samples),
        used_tokens=used,
    )


def join_images(images: Sequence[Images[NDArray[Any]]], lengths: Sequence[int], patch: int) -> Images[NDArray[Any]]:
    """Images of texts of so many tokens that are laid side by side: places and embeddings are counted on.

    sources [[0, -1], [0, 1]], embeddings [1, 2], slots [[2, 3], [0, 1]], lengths [5, 4]
        -> sources [0 -1 1 2], slots [2 3 5 6]
    """
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    sources, shares = offset([(i.sources, i.shares) for i in images], [int(i.embeddings.sum()) for i in images])
    tilings = [i.tilings for i in images if i.tilings is not None]
    return Images(
        # Not torch.cat: see positions.py
        patches=np.concatenate([np.empty((0, patch * patch * 3), dtype=np.uint8), *(i.patches for i in images)]),
        grids=np.concatenate([np.empty((0, 2), dtype=np.int64), *(i.grids for i in images)]),
        views=np.concatenate([_NONE, *(i.views for i in images)]),
        embeddings=np.concatenate([_NONE, *(i.embeddings for i in images)]),
        slots=np.concatenate([_NONE, *(i.slots + start for i, start in zip(images, starts, strict=False))]),
        sources=sources,
        shares=shares,
        tilings=np.concatenate(tilings) if tilings else None,
    )


def as_tensors(images: Images[NDArray[Any]]) -> Images[Tensor]:
    """The same memory."""
    arrays = {field.name: getattr(images, field.name) for field in fields(Images)}
    return Images(**{name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()})
