"""How tensors of Hugging Face become one of ours, each way with its inverse. Pure: nothing is rounded or lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a transform needs to know of the part that its tensors belong to."""

    heads: int = 1
    """Query heads."""
    kv_heads: int = 1
    """Key and value heads; divides heads."""
    patch: int = 1
    """Side of a patch, pixels."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """`split(join(tensors)) == tensors`, to the bit, whatever the type of the numbers."""

    join: Callable[[Sequence[Tensor], Sizes], Tensor]
    """Theirs to ours."""
    split: Callable[[Tensor, Sizes], list[Tensor]]
    """Ours to theirs."""


def _interleave(qkv: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """Three matrices (or biases) to one. With 4 query and 2 key/value heads, rows a head:

    q0 q1 q2 q3 | k0 k1 | v0 v1  ->  q0 q1 k0 v0 | q2 q3 k1 v1

    so that a tensor rank's share is a run of rows that holds whole groups.
    """
    counts = (sizes.heads // sizes.kv_heads, 1, 1)
    grouped = [x.reshape(sizes.kv_heads, n, -1, *x.shape[1:]) for x, n in zip(qkv, counts, strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _deinterleave(joined: Tensor, sizes: Sizes) -> list[Tensor]:
    per_group = sizes.heads // sizes.kv_heads
    grouped = joined.reshape(sizes.kv_heads, per_group + 2, -1, *joined.shape[1:])
    parts = grouped.split((per_group, 1, 1), dim=1)
    return [part.flatten(0, 2).contiguous() for part in parts]


IDENTITY = Transform(join=lambda tensors, _: tensors[0], split=lambda tensor, _: [tensor])
"""The same tensor under another name."""

QKV = Transform(join=_interleave, split=_deinterleave)
"""Query, key and value projections to megatron's one, interleaved by key/value head."""

GATE_UP = Transform(
    join=lambda tensors, _: torch.cat(tuple(tensors)),
    split=lambda tensor, _: [half.contiguous() for half in tensor.chunk(2)],
)
"""SwiGLU's two matrices [F, D] to one [2F, D], the gate's rows first."""

PATCH = Transform(
    join=lambda tensors, _: tensors[0].movedim(1, -1).flatten(1),
    split=lambda tensor, sizes: [
        tensor.reshape(tensor.shape[0], sizes.patch, sizes.patch, -1).movedim(-1, 1).contiguous()
    ],
)
"""The patch convolution [D, 3, p, p] to the matrix [D, p p 3], in the order of `vlm_nemo.types.Images`."""

TEMPORAL_PATCH = Transform(
    join=lambda tensors, _: tensors[0].movedim(1, -1).flatten(2),
    split=lambda tensor, sizes: [
        tensor.reshape(*tensor.shape[:2], sizes.patch, sizes.patch, -1).movedim(-1, 1).contiguous()
    ],
)
"""The same for patches that span frames: [D, 3, t, p, p] to [D, t, p p 3]."""
