"""Decoder layers that look at the image instead of at the text: Llama 3.2 Vision's, gates and all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from vlm_nemo.model.attention import dense_attention
from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.looks import look_at
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.segments import Segments
from vlm_nemo.model.transformer import mlp_spec


def looking_layer() -> ModuleSpec:
    """The spec of one such layer."""
    return ModuleSpec(
        module=LookingLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            cross_attention=ModuleSpec(module=CrossAttention),
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_spec()),
        ),
    )


class LookingLayer(TransformerLayer):
    """Norm, attention to features, gate, residual; norm, MLP, gate, residual. A gate is tanh of a number that starts
    at zero: a fresh layer changes nothing."""

    def __init__(self, config: TransformerConfig, *given: Any, **named: Any) -> None:
        super().__init__(config, *given, **named)
        self.attention_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        self.mlp_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        for gate in (self.attention_gate, self.mlp_gate):  # every tensor rank sees other tokens
            gate.sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden_states: Tensor, *, context: Tensor, packed_seq_params: Segments | CachedStep, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: [T, 1, D] (split over the tensor group under sequence parallelism); context: [E, 1, D]."""
        assert packed_seq_params.looks is not None, "the row does not say who looks where"
        x = hidden_states
        looked = self.cross_attention(self.input_layernorm(x), context, packed_seq_params)
        x = x + self.attention_gate.tanh() * looked
        out, bias = self.mlp(self.pre_mlp_layernorm(x))
        assert bias is None, "a decoder's MLP has no bias"
        seen = packed_seq_params.looks.seen
        if self.config.sequence_parallel:
            ranks, rank = self.config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
            seen = seen.chunk(ranks)[rank]
        return x + self.mlp_gate.tanh() * (out * seen), context


class CrossAttention(MegatronModule):
    """Queries of the text, keys and values of the features; heads split over the tensor group, norms of every head.

    Keys and values come from one matrix, head by head (k0 v0 | k1 v1), so that a tensor rank's rows are whole heads.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.layer, self.dim, self.scale = layer_number, config.kv_channels, config.softmax_scale
        self.kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        whole = copy.copy(config)  # features are not split over the tensor group, text may be
        whole.sequence_parallel = False
        width = config.hidden_size
        linear: dict[str, Any] = {"init_method": config.init_method, "bias": False}
        inner = config.num_attention_heads * self.dim
        self.linear_q = ColumnParallelLinear(width, inner, config=config, gather_output=False, **linear)
        self.linear_kv = ColumnParallelLinear(
            width, 2 * config.num_query_groups * self.dim, config=whole, gather_output=False, **linear
        )
        self.linear_proj = RowParallelLinear(
            inner, width, config=config, input_is_parallel=True, skip_bias_add=False, **linear
        )
        self.q_layernorm = Norm(whole, self.dim, config.layernorm_epsilon)
        self.k_layernorm = Norm(whole, self.dim, config.layernorm_epsilon)

    def forward(self, x: Tensor, context: Tensor, where: Segments | CachedStep) -> Tensor:
        """x: [T, 1, D], context: [E, 1, D] -> [T, 1, D]"""
        q = self.linear_q(x)[0]
        q = self.q_layernorm(q.view(q.shape[0], 1, -1, self.dim))
        k, v = self.linear_kv(context)[0].view(context.shape[0], 1, self.kv_heads, 2, self.dim).unbind(3)
        k = self.k_layernorm(k)
        assert where.looks is not None
        ranges = [(start, stop, look_at(k, spans), look_at(v, spans)) for start, stop, spans in where.looks.ranges]
        if isinstance(where, CachedStep):
            ranges = sorted([*ranges, *where.remembered(self.layer, k, v)], key=lambda found: found[0])
        out, at = [], 0
        for start, stop, keys, values in ranges:
            if start > at:
                out.append(q[at:start].flatten(2) * 0)
            out.append(dense_attention(q[start:stop], keys, values, False, self.scale))
            at = stop
        if at < len(q):
            out.append(q[at:].flatten(2) * 0)
        joined = torch.cat(out)
        if not ranges:  # nobody looks, but the gradients exist, and all ranks run the same collectives
            joined = joined + (k.sum() + v.sum()) * 0
        return self.linear_proj(joined)[0]
