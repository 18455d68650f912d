"""Rotary positions: frequencies, stretched for longer texts, a row's table of cosines and sines, and the turn itself.

M-RoPE (Qwen2-VL) gives a token three positions, time, row and column; sections say how many frequencies follow each:

    sections [2, 1, 1]      frequency  0 1 2 3
                            follows    t t y x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_nemo.model.config import LanguageConfig, RopeScaling
from vlm_nemo.runtime import device
from vlm_nemo.runtime.fusion import fused


def frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """[dim / 2] fp32: the angle by which each pair of channels turns from one position to the next."""
    found = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None or scaling.kind == "none":
        return found
    if scaling.kind == "linear":
        return found / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    return _llama3(found, scaling)


def _llama3(found: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by factor, short ones stay, those between pass from one to the other."""
    wave = 2 * math.pi / found
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stay = ((scaling.original_positions / wave - low) / (high - low)).clamp(0, 1)
    return (1 - stay) * found / scaling.factor + stay * found


def angles(positions: Tensor, found: Tensor, sections: Sequence[int] = ()) -> Tensor:
    """positions: [3, B, T]; found: [d / 2], from `frequencies` -> [T, B, 1, d / 2].

    sections: frequencies that follow each of the three positions; empty = all follow the first.
    """
    if sections:
        each = [p[..., None].float() * f for p, f in zip(positions, found.split(list(sections)), strict=True)]
        turns = torch.cat(each, dim=-1)
    else:
        turns = positions[0][..., None].float() * found
    return turns.transpose(0, 1).unsqueeze(2)


def table(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles [..., d / 2] fp32 -> [..., d]: their cosines, then their sines. Once a row; layers only multiply."""
    return torch.cat((turns.cos(), turns.sin()), dim=-1).to(dtype)


def turn(q: Tensor, k: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with every channel i of the first half of a head turned against i of the second half, as Llama
    does it.

    q: [T, B, heads, d]; k: [T, B, kv_heads, d]; by: [T, B, 1, d], from `table` -> as q and k.
    """
    assert q.shape[-1] == by.shape[-1] and q.dtype == by.dtype, (q.shape, by.shape, q.dtype, by.dtype)
    return _Turn.apply(q, k, by)


class _Turn(torch.autograd.Function):
    """Keeps the table alone: gradients turn back by it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(by)
        cos, sin = by.chunk(2, dim=-1)
        return _turned(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor) -> tuple[Tensor, Tensor, None]:
        cos, sin = ctx.saved_tensors[0].chunk(2, dim=-1)
        return *_turned(to_q, to_k, cos, -sin), None


@fused
def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned_heads(q, cos, sin), _turned_heads(k, cos, sin)


def _turned_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.unflatten(-1, (2, -1))
    a, b = halves.unbind(-2)
    out = halves * cos.unsqueeze(-2)
    # Not unbind: torch.compile would make a kernel for each length
    out.select(-2, 0).sub_(b * sin)
    out.select(-2, 1).add_(a * sin)
    return out.flatten(-2)


class Rotary(nn.Module):
    """The decoder's table: [T, B, 1, d], or [2, T, B, 1, d] (global layers', local layers') where local ones turn
    by a base of their own. Stands where GPTModel keeps its rotary module, and is called like megatron's M-RoPE."""

    def __init__(self, cfg: LanguageConfig, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Plain tensors, not buffers: a model cast to bf16 would cast those too
        self.everywhere = frequencies(head_dim, cfg.rope_base, cfg.rope_scaling).to(device.device())
        self.local: Tensor | None = None
        if cfg.rope_local_base is not None:
            self.local = frequencies(head_dim, cfg.rope_local_base).to(device.device())
        self.sections, self.dtype = list(cfg.mrope_section), dtype

    def forward(self, positions: Tensor, *given: object, **more: object) -> Tensor:
        turns = angles(positions, self.everywhere, self.sections)
        if self.local is not None:
            turns = torch.stack((turns, angles(positions, self.local, self.sections)))
        return table(turns, self.dtype)
