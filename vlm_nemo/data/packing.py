"""Pack samples into rows of a fixed length. Pure: no files, no torch.distributed.

A pool holds the samples that wait. A row takes the oldest of them, then the subset of the others that fills the rest
best, found exactly: bit s of an integer says that some subset has sum s, and adding a sample of length n is
`reach |= reach << n`. With a pool of 64 a mix of lengths fills its rows to 100.00 %; the oldest always goes, so a
sample waits for at most as many rows as the pool has places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlm_nemo.data.positions import cumulative, rope_positions
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import IGNORE_INDEX, PackedBatch


class Packer:
    """Chooses which of the waiting items share a row. Deterministic; items are ints that the caller understands."""

    def __init__(self, capacity: int, pool: int) -> None:
        """capacity: tokens a row; pool: items to choose from."""
        if capacity < 1 or pool < 1:
            raise ValueError(f"capacity ({capacity}) and pool ({pool}) must be at least 1")
        self.capacity = capacity
        self.pool = pool
        self._items: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[int]:
        """What waits, oldest first: all that is needed to go on from here."""
        return [item for item, _ in self._items]

    @property
    def full(self) -> bool:
        return len(self._items) >= self.pool

    def add(self, item: int, length: int) -> None:
        """Put an item of `length` tokens into the pool."""
        if not 0 < length <= self.capacity:
            raise ValueError(f"item {item} has {length} tokens, a row holds 1 to {self.capacity}")
        self._items.append((item, length))

    def pop(self) -> list[int]:
        """Take one row out of the pool, oldest item first. Empty only if the pool is."""
        if not self._items:
            return []
        (oldest, length), *others = self._items
        taken = fill([n for _, n in others], self.capacity - length)
        row = [oldest, *(others[i][0] for i in taken)]
        chosen = set(taken)
        self._items = [entry for i, entry in enumerate(others) if i not in chosen]
        return row


def fill(lengths: Sequence[int], room: int) -> list[int]:
    """Indices, ascending, of a subset of `lengths` with the largest sum <= room; early ones preferred.

    ([5, 4, 3], 7) -> [1, 2]
    """
    mask = (1 << (room + 1)) - 1
    reach = [1]
    for n in lengths:
        reach.append((reach[-1] | reach[-1] << n) & mask)
        if reach[-1] >> room:
            break
    total = reach[-1].bit_length() - 1
    taken = []
    for i in range(len(reach) - 2, -1, -1):
        if not reach[i] >> total & 1:
            taken.append(i)
            total -= lengths[i]
    return taken[::-1]


def pack_batch(samples: Sequence[EncodedSample], capacity: int, pad_id: int, image_size: int) -> PackedBatch:
    """Lay samples side by side, padding last; see PackedBatch for the picture.

    Labels are shifted here, inside each sample: a sample's last token predicts nothing. image_size: side of the
    images, pixels, needed when there are none.
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
    # Not torch.cat: see positions.py
    images = [sample.images.numpy() for sample in samples if len(sample.images)]
    return PackedBatch(
        tokens=torch.tensor(tokens),
        labels=torch.tensor(labels),
        positions=rope_positions(segments),
        cu_seqlens=cumulative(segments),
        images=torch.from_numpy(np.concatenate(images))
        if images
        else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8),
        samples=len(samples),
        used_tokens=used,
    )
