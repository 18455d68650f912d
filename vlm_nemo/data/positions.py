"""Position ids of packed rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_positions(lengths: Sequence[int]) -> Tensor:
    """[3, 2] -> [0 1 2 0 1], int64: positions restart in every segment."""
    total = sum(lengths)
    starts = torch.repeat_interleave(
        torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(list(lengths)), output_size=total
    )
    return torch.arange(total) - starts


def rope_positions(lengths: Sequence[int]) -> Tensor:
    """[3, T] int64: three equal rows (t, y, x), as plain RoPE needs them where M-RoPE is computed."""
    return segment_positions(lengths).expand(3, -1).contiguous()


def cumulative(lengths: Sequence[int]) -> Tensor:
    """[3, 4, 1] -> [0 3 7 8], int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
