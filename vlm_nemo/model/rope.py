"""Rotary positions: frequencies, stretched for longer texts, and the table of angles of a row. Pure but for `Rotary`.

M-RoPE (Qwen2-VL) gives a token three positions, time, row and column; sections say how many frequencies follow each:

    sections [2, 1, 1]      frequency  0 1 2 3
                            follows    t t y x
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_nemo.model.config import LanguageConfig, RopeScaling
from vlm_nemo.runtime import device


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
    """positions: [3, B, T]; found: [d / 2], from `frequencies` -> [T, B, 1, d], both halves of a head alike.

    sections: frequencies that follow each of the three positions; empty = all follow the first.
    """
    if sections:
        each = [p[..., None].float() * f for p, f in zip(positions, found.split(list(sections)), strict=True)]
        half = torch.cat(each, dim=-1)
    else:
        half = positions[0][..., None].float() * found
    return torch.cat((half, half), dim=-1).transpose(0, 1).unsqueeze(2)


class Rotary(nn.Module):
    """The decoder's angles: [T, B, 1, d], or [2, T, B, 1, d] (global layers', local layers') where local ones turn
    by a base of their own. Stands where GPTModel keeps its rotary module, and is called like megatron's M-RoPE."""

    def __init__(self, cfg: LanguageConfig, head_dim: int) -> None:
        super().__init__()
        # Plain tensors, not buffers: a model cast to bf16 would cast those too
        self.everywhere = frequencies(head_dim, cfg.rope_base, cfg.rope_scaling).to(device.device())
        self.local: Tensor | None = None
        if cfg.rope_local_base is not None:
            self.local = frequencies(head_dim, cfg.rope_local_base).to(device.device())
        self.sections = list(cfg.mrope_section)

    def forward(self, positions: Tensor, *given: object, **more: object) -> Tensor:
        table = angles(positions, self.everywhere, self.sections)
        if self.local is None:
            return table
        return torch.stack((table, angles(positions, self.local, self.sections)))
