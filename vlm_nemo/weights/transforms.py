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
    frames: int = 1
    """Frames that a patch spans."""
    experts: int = 0
    """Experts of a sparse layer."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """`split(join(tensors)) == tensors`, to the bit, whatever the type of the numbers."""

    join: Callable[[Sequence[Tensor], Sizes], Tensor]
    """Theirs to ours."""
    split: Callable[[Tensor, Sizes], list[Tensor]]
    """Ours to theirs."""


def _interleave(tensors: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """Three matrices (or biases) to one. With 4 query and 2 key/value heads, rows a head:

    q0 q1 q2 q3 | k0 k1 | v0 v1  ->  q0 q1 k0 v0 | q2 q3 k1 v1

    so that a tensor rank's share is a run of rows that holds whole groups. Of key and value alone likewise.
    """
    counts = _counts(sizes)[-len(tensors) :]
    grouped = [x.reshape(sizes.kv_heads, n, -1, *x.shape[1:]) for x, n in zip(tensors, counts, strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _deinterleave(joined: Tensor, counts: tuple[int, ...], kv_heads: int) -> list[Tensor]:
    grouped = joined.reshape(kv_heads, sum(counts), -1, *joined.shape[1:])
    return [part.flatten(0, 2).contiguous() for part in grouped.split(counts, dim=1)]


def _counts(sizes: Sizes) -> tuple[int, int, int]:
    """Heads of query, key and value in a group."""
    return sizes.heads // sizes.kv_heads, 1, 1


def _patch(tensors: Sequence[Tensor], _: Sizes) -> Tensor:
    """[D, 3, p, p] -> [D, p p 3]"""
    return tensors[0].permute(0, 2, 3, 1).flatten(1)


def _convolution(ours: Tensor, sizes: Sizes) -> list[Tensor]:
    square = ours.reshape(ours.shape[0], sizes.patch, sizes.patch, 3)
    return [square.permute(0, 3, 1, 2).contiguous()]


def _frames(tensors: Sequence[Tensor], _: Sizes) -> Tensor:
    """[D, 3, t, p, p] -> [D, t, p p 3]"""
    return tensors[0].permute(0, 2, 3, 4, 1).flatten(2)


def _volume(ours: Tensor, sizes: Sizes) -> list[Tensor]:
    cube = ours.reshape(ours.shape[0], sizes.frames, sizes.patch, sizes.patch, 3)
    return [cube.permute(0, 4, 1, 2, 3).contiguous()]


def _before_identity(tensors: Sequence[Tensor], _: Sizes) -> Tensor:
    """Two layers of which the second changes nothing, to the first alone. Raises ValueError where it does."""
    first, second = tensors
    nothing = torch.eye(*second.shape, dtype=second.dtype, device=second.device) if second.dim() == 2 else None
    if not torch.equal(second, torch.zeros_like(second) if nothing is None else nothing):
        raise ValueError("two linear layers without an activation between; the second must be the identity")
    return first


def _with_identity(tensor: Tensor, _: Sizes) -> list[Tensor]:
    n = tensor.shape[0]
    new = torch.zeros if tensor.dim() == 1 else torch.eye
    return [tensor, new(n, dtype=tensor.dtype, device=tensor.device)]


IDENTITY = Transform(join=lambda tensors, _: tensors[0], split=lambda tensor, _: [tensor])
"""The same tensor under another name."""

QKV = Transform(join=_interleave, split=lambda tensor, sizes: _deinterleave(tensor, _counts(sizes), sizes.kv_heads))
"""Query, key and value projections to megatron's one, interleaved by key/value head."""

KV = Transform(join=_interleave, split=lambda tensor, sizes: _deinterleave(tensor, (1, 1), sizes.kv_heads))
"""The same of key and value alone, where queries come from elsewhere (cross-attention)."""

FUSED_QKV = Transform(
    join=lambda tensors, sizes: _interleave(tensors[0].chunk(3), sizes),
    split=lambda tensor, sizes: [torch.cat(_deinterleave(tensor, _counts(sizes), sizes.kv_heads))],
)
"""All queries, all keys, all values in one matrix (or bias), as many of each, to megatron's interleaved one."""

GATE_UP = Transform(
    join=lambda tensors, _: torch.cat(tuple(tensors)),
    split=lambda tensor, _: [half.contiguous() for half in tensor.chunk(2)],
)
"""SwiGLU's two matrices [F, D] to one [2F, D], the gate's rows first."""

PATCH = Transform(join=_patch, split=_convolution)
"""The patch convolution [D, 3, p, p] to the matrix [D, p p 3] in the order of `Images.patches`: row, column, colour."""

PATCH_FRAMES = Transform(join=_frames, split=_volume)
"""The same of a convolution over t frames: [D, 3, t, p, p] to [D, t, p p 3]."""

UNSQUEEZED = Transform(join=lambda tensors, _: tensors[0].squeeze(0), split=lambda tensor, _: [tensor.unsqueeze(0)])
"""[1, …] to […]"""

TWICE_UNSQUEEZED = Transform(
    join=lambda tensors, _: tensors[0].squeeze(0).squeeze(0), split=lambda tensor, _: [tensor[None, None]]
)
"""[1, 1, D] to [D]"""

TRANSPOSED = Transform(
    join=lambda tensors, _: tensors[0].t().contiguous(), split=lambda tensor, _: [tensor.t().contiguous()]
)
"""A matrix that is multiplied from the right, [in, out], to [out, in]."""

BEFORE_IDENTITY = Transform(join=_before_identity, split=_with_identity)
"""One linear layer as a class that has two says it: the second is the identity (or zeros, of the biases)."""
