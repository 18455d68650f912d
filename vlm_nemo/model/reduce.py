"""Fewer vectors a view: neighbours side by side in one wider vector, or their mean. Pure.

With factor 2, a view of 2 x 4 patches becomes two vectors; a block's patches follow one another row by row:

    0 1 | 2 3
    4 5 | 6 7      ->  [0 1 4 5] [2 3 6 7]

InternVL's and Idefics3's pixel shuffle, Qwen2-VL's merger and Ovis' hidden stride all come down to this order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.config import ReduceConfig
from vlm_nemo.model.views import Grid, runs


def reduced_grid(grid: Grid, cfg: ReduceConfig) -> Grid:
    """Rows and columns of what is left. Raises ValueError where the factor does not divide the grid and must."""
    if cfg.kind == "none":
        return grid
    if cfg.kind != "hidden_stride" and (grid[0] % cfg.factor or grid[1] % cfg.factor):
        raise ValueError(
            f"a view of {grid[0]} x {grid[1]} patches is not a multiple of model.reduce.factor={cfg.factor}; "
            "model.reduce.kind=hidden_stride pads it"
        )
    return -(-grid[0] // cfg.factor), -(-grid[1] // cfg.factor)


def reduced_width(width: int, cfg: ReduceConfig) -> int:
    """Width of what is left."""
    return width if cfg.kind in ("none", "average_pool") else width * cfg.factor**2


def reduce(features: Tensor, grids: Sequence[Grid], cfg: ReduceConfig) -> tuple[Tensor, list[Grid]]:
    """[N, D] of views with these grids -> [E, D f f] (average_pool: [E, D]) and their new grids."""
    left = [reduced_grid(grid, cfg) for grid in grids]
    if cfg.kind == "none":
        return features, left
    parts, start, f, width = [], 0, cfg.factor, features.shape[1]
    for (height, across), count in runs(grids):
        stop = start + count * height * across
        x = features[start:stop].view(count, height, across, width)
        start = stop
        if height % f or across % f:
            x = F.pad(x, (0, 0, 0, -across % f, 0, -height % f))
        x = x.view(count, -(-height // f), f, -(-across // f), f, width).transpose(2, 3)
        if cfg.kind == "average_pool":
            parts.append(x.mean((3, 4)).reshape(-1, width))
        else:
            parts.append(x.reshape(-1, f * f * width))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), left
