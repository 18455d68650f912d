"""Queries that look at something else: the attention of Q-Former and Perceiver, heads split over the tensor group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.runtime import groups


class CrossAttention(MegatronModule):
    """q: [V, Q, D], context: [N, C], the context of each of the V following the other's -> [V, Q, D].

    Keys and values come from one matrix, head by head (k0 v0 | k1 v1), so that a tensor rank's rows are whole heads.
    """

    def __init__(self, config: TransformerConfig, context_width: int) -> None:
        super().__init__(config=config)
        self.dim = config.kv_channels
        self.linear_q = column(config, config.hidden_size, config.num_attention_heads * self.dim)
        self.linear_kv = column(config, context_width, 2 * config.num_query_groups * self.dim)
        self.linear_proj = row(config, config.num_attention_heads * self.dim, config.hidden_size)

    def forward(self, queries: Tensor, context: Tensor, lengths: Sequence[int]) -> Tensor:
        """lengths: how many of the N belong to each of the V."""
        views, many, _ = queries.shape
        q = self.linear_q(queries)[0].view(views, many, -1, self.dim)
        k, v = self.linear_kv(context)[0].view(context.shape[0], -1, 2, self.dim).unbind(2)
        parts, view, start = [], 0, 0
        for length, same in groupby(lengths):
            count = len(list(same))
            stop = start + count * length
            seen = (x[start:stop].view(count, length, -1, self.dim) for x in (k, v))
            parts.append(attend(q[view : view + count], *seen))
            view, start = view + count, stop
        return self.linear_proj(parts[0] if len(parts) == 1 else torch.cat(parts))[0]


class SelfAttention(MegatronModule):
    """[V, Q, D] -> the same: the queries of a view look at one another."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.dim = config.kv_channels
        inner = config.num_attention_heads * self.dim
        self.linear_qkv = column(config, config.hidden_size, 3 * inner)
        self.linear_proj = row(config, inner, config.hidden_size)

    def forward(self, queries: Tensor) -> Tensor:
        qkv = self.linear_qkv(queries)[0].view(*queries.shape[:2], -1, 3, self.dim)
        return self.linear_proj(attend(*qkv.unbind(3)))[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[V, Q, heads, d], [V, L, kv_heads, d] twice -> [V, Q, heads * d]; every query sees all L."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def column(config: TransformerConfig, width_in: int, width_out: int, gather: bool = False) -> ColumnParallelLinear:
    """A linear layer whose outputs are split over the tensor group, or gathered from it."""
    return ColumnParallelLinear(
        width_in,
        width_out,
        config=config,
        init_method=config.init_method,
        bias=config.add_bias_linear,
        gather_output=gather,
        tp_group=groups.vision_group(),
    )


def row(config: TransformerConfig, width_in: int, width_out: int) -> RowParallelLinear:
    """A linear layer whose inputs are split over the tensor group, its outputs whole."""
    return RowParallelLinear(
        width_in,
        width_out,
        config=config,
        init_method=config.init_method,
        bias=config.add_bias_linear,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.vision_group(),
    )
