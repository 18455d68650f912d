"""Position ids of packed rows. Pure.

NumPy: a server of exported models has no torch. And threads call it: each that runs a larger operation of PyTorch
starts a team of OpenMP threads, which spin when they are done; more CPU went into that than into decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def segment_positions(lengths: Sequence[int]) -> NDArray[np.int64]:
    """[3, 2] -> [0 1 2 0 1], int64: positions restart in every segment."""
    return _restarting(lengths)


def rope_positions(lengths: Sequence[int]) -> NDArray[np.int64]:
    """[3, T] int64: three equal rows (t, y, x), as plain RoPE needs them where M-RoPE is computed."""
    return np.tile(_restarting(lengths), (3, 1))


def grid_positions(length: int, spans: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """[3, T] (t, y, x), as Qwen2-VL counts: text goes on by one in all three, an image by its rows and columns.

    length=7, spans=[(1, 2, 2)], (start, rows, columns):
        t  0 1 1 1 1 3 4        text goes on behind the largest position before it
        y  0 1 1 2 2 3 4
        x  0 1 2 1 2 3 4
    """
    found = np.empty((3, length), dtype=np.int64)
    at = position = 0
    for start, rows, columns in [*spans, (length, 0, 0)]:
        found[:, at:start] = np.arange(position, position + start - at)
        position, at = position + start - at, start + rows * columns
        if rows * columns:
            found[0, start:at] = position
            found[1, start:at] = position + np.repeat(np.arange(rows), columns)
            found[2, start:at] = position + np.tile(np.arange(columns), rows)
            position += max(rows, columns)
    return found


def packed_positions(segments: Sequence[int], own: Sequence[NDArray[np.int64] | None]) -> NDArray[np.int64]:
    """[3, T] int64: each segment's own positions, where it has some, else three equal rows from 0."""
    found = np.tile(_restarting(segments), (3, 1))
    at = 0
    for length, positions in zip(segments, own, strict=False):
        if positions is not None:
            found[:, at : at + length] = positions
        at += length
    return found


def _restarting(lengths: Sequence[int]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *lengths[:-1]])
    return np.arange(sum(lengths)) - np.repeat(starts, lengths)


def cumulative(lengths: Sequence[int]) -> NDArray[np.int32]:
    """[3, 4, 1] -> [0 3 7 8], int32."""
    return np.cumsum([0, *lengths], dtype=np.int32)
