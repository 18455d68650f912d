"""Ways to put samples into rows of a fixed length or into padded batches: the repository's, and what others do.

Each takes lengths in the order in which samples arrive and says for every row which of them it holds, how many had
arrived by then, and how many places the row has.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlm_nemo.data.packing import Packer

BATCH = 16
"""Samples of a padded batch."""


class Row(NamedTuple):
    items: list[int]
    """Indices of samples."""
    arrived: int
    """Samples that had to be known for it."""
    places: int
    """Tokens that the model computes, padding included."""


Method = Callable[[Sequence[int], int], Iterator[Row]]


def subset_sum(pool: int) -> Method:
    """The repository's: the oldest of a pool, then the best filling, exactly."""

    def rows(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
        packer = Packer(capacity, pool)
        for i, length in enumerate(lengths):
            packer.add(i, length)
            if packer.full:
                yield Row(packer.pop(), i + 1, capacity)

    return rows


def next_fit(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
    """One open row; what does not fit opens the next."""
    row: list[int] = []
    used = 0
    for i, length in enumerate(lengths):
        if used + length > capacity:
            yield Row(row, i + 1, capacity)
            row, used = [], 0
        row.append(i)
        used += length


def first_fit_decreasing(buffer: int) -> Method:
    """Sort a buffer, longest first; each sample goes into the first row with room; then the next buffer."""

    def rows(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
        for start in range(0, len(lengths) - buffer + 1, buffer):
            held: list[list[int]] = []
            room: list[int] = []
            for i in sorted(range(start, start + buffer), key=lambda i: -lengths[i]):
                row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
                if row is None:
                    held.append([i])
                    room.append(capacity - lengths[i])
                else:
                    held[row].append(i)
                    room[row] -= lengths[i]
            yield from (Row(items, start + buffer, capacity) for items in held)

    return rows


def best_fit(open_rows: int) -> Method:
    """So many open rows; a sample goes into the fullest with room; with none, the fullest leaves."""

    def rows(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
        room: list[tuple[int, int]] = []  # (free places, row), ascending
        held: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            at = bisect_left(room, (length, -1))
            if at < len(room):
                free, row = room.pop(at)
            else:
                if len(room) == open_rows:
                    yield Row(held.pop(room.pop(0)[1]), i + 1, capacity)
                free, row = capacity, i
                held[row] = []
            held[row].append(i)
            insort(room, (free - length, row))

    return rows


def padded(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
    """Batches as samples come, each padded to its longest."""
    for start in range(0, len(lengths) - BATCH + 1, BATCH):
        items = list(range(start, start + BATCH))
        yield Row(items, start + BATCH, BATCH * max(lengths[i] for i in items))


def padded_by_length(buffer: int) -> Method:
    """A buffer is sorted by length and cut into batches, which are then shuffled (transformers' group_by_length)."""

    def rows(lengths: Sequence[int], capacity: int) -> Iterator[Row]:
        rng = np.random.Generator(np.random.PCG64(0))
        for start in range(0, len(lengths) - buffer + 1, buffer):
            order = sorted(range(start, start + buffer), key=lambda i: -lengths[i])
            for batch in rng.permutation(buffer // BATCH).tolist():
                items = order[batch * BATCH : (batch + 1) * BATCH]
                yield Row(items, start + buffer, BATCH * lengths[items[0]])

    return rows


METHODS: dict[str, Method] = {
    "subset sum, pool 64 (ours)": subset_sum(64),
    "subset sum, pool 16 (ours)": subset_sum(16),
    "best-fit, 64 open rows": best_fit(64),
    "first-fit decreasing, 1024": first_fit_decreasing(1024),
    "next-fit": next_fit,
    "padded, grouped by length": padded_by_length(50 * BATCH),
    "padded, as they come": padded,
}
PADDED = ("padded, grouped by length", "padded, as they come")
"""Batches as long as their longest sample: there are no rows."""
