"""Position ids of packed rows. Pure.

NumPy inside: threads call it, and each thread that runs a larger operation of PyTorch starts a team of OpenMP threads,
which spin when they are done; more CPU went into that than into decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def segment_positions(lengths: Sequence[int]) -> Tensor:
    """[3, 2] -> [0 1 2 0 1], int64: positions restart in every segment."""
    return torch.from_numpy(_restarting(lengths))


def rope_positions(lengths: Sequence[int]) -> Tensor:
    """[3, T] int64: three equal rows (t, y, x), as plain RoPE needs them where M-RoPE is computed."""
    return torch.from_numpy(np.tile(_restarting(lengths), (3, 1)))


def _restarting(lengths: Sequence[int]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *lengths[:-1]])
    return np.arange(sum(lengths)) - np.repeat(starts, lengths)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """[3, 4, 1] -> [0 3 7 8], int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
