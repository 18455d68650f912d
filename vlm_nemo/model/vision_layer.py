"""One layer of a vision tower: attention among the patches of a view or window, then an MLP, with every switch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from vlm_nemo.model.attention import CoreAttention
from vlm_nemo.model.boxes import split_rows
from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.kernels import PLAIN, Kernels
from vlm_nemo.model.segments import Segments
from vlm_nemo.model.self_attention import RotarySelfAttention
from vlm_nemo.model.tiles import TileAttention, TileRows
from vlm_nemo.model.transformer import mlp_spec, sum_over_ranks
from vlm_nemo.runtime import groups


def tower_spec(
    cfg: VisionConfig, num_layers: int, kernels: Kernels = PLAIN, *, gated: bool = False
) -> TransformerBlockSubmodules:
    """Pre-norm layers: norm, attention, residual, norm, MLP, residual. gated: what is added is times a learned gate."""
    if cfg.bias and not (cfg.qkv_bias and cfg.output_bias):
        # its layer takes a bias away from a linear that was built with one
        kernels = replace(PLAIN, fused_gradients=kernels.fused_gradients)
    layer = ModuleSpec(
        module=TowerLayer,
        params={"layer_scale": cfg.layer_scale is not None, "gated": gated},
        submodules=TransformerLayerSubmodules(
            input_layernorm=kernels.norm,
            self_attention=ModuleSpec(
                module=TowerSelfAttention,
                params={
                    "attn_mask_type": AttnMaskType.no_mask,
                    "qkv_bias": cfg.qkv_bias,
                    "output_bias": cfg.bias and cfg.output_bias,
                    "qk_norm": cfg.qk_norm,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=kernels.column,
                    core_attention=CoreAttention if cfg.tiles is None else TileAttention,
                    linear_proj=kernels.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=kernels.norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_spec(kernels)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=kernels.norm)


class TowerLayer(TransformerLayer):
    """megatron's layer with a learned factor a channel on what each half adds (LayerScale), where there is one, or the
    tanh of a learned number (a gate)."""

    def __init__(self, config: TransformerConfig, *given: Any, layer_scale: bool, gated: bool, **more: Any) -> None:
        super().__init__(config, *given, **more)
        self.attention_scale = self.mlp_scale = self.attention_gate = self.mlp_gate = None
        if layer_scale:
            self.attention_scale = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
            self.mlp_scale = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        if gated:
            self.attention_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
            self.mlp_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: Segments | TileRows,
        rotary_pos_emb: Tensor | None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[N, 1, D] -> the same; the None is megatron's context."""
        x = hidden_states
        attended = self.self_attention(
            self.input_layernorm(x),
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        x = x + _scaled(attended, self.attention_scale, self.attention_gate)
        return x + _scaled(self.mlp(self.pre_mlp_layernorm(x)), self.mlp_scale, self.mlp_gate), None


def _scaled(output_and_bias: tuple[Tensor, Tensor | None], scale: Tensor | None, gate: Tensor | None) -> Tensor:
    out, bias = output_and_bias
    if bias is not None:
        out = out + bias
    if gate is not None:
        out = gate.tanh() * out
    return out if scale is None else out * scale


class TowerSelfAttention(RotarySelfAttention):
    """The decoder's, with switches of its own for the biases, and norms over all heads."""

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *given: Any, **more: Any
    ) -> None:
        qkv_bias, output_bias, qk_norm = (more.pop(name) for name in ("qkv_bias", "output_bias", "qk_norm"))
        super().__init__(config, submodules, *given, **more)
        if not qkv_bias:  # megatron's own switch can add this bias, but not leave it out alone
            self.linear_qkv.register_parameter("bias", None)
        if not output_bias:
            self.linear_proj.register_parameter("bias", None)
        self.q_norm = WideNorm(config) if qk_norm else None
        self.k_norm = WideNorm(config) if qk_norm else None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *given: Any, **more: Any) -> Any:
        """[N, 1, D] -> query, key, value, [N, 1, heads, d] each."""
        query, key, value = super().get_query_key_value_tensors(hidden_states, *given, **more)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.flatten(2)).view_as(query)
            key = self.k_norm(key.flatten(2)).view_as(key)
        return query, key, value


class WideNorm(nn.Module):
    """RMSNorm over the width of all heads, of which this tensor rank has some. x: [..., D/T] -> [..., D/T]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps, self.width = config.layernorm_epsilon, config.hidden_size
        local = config.hidden_size // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.ones(local, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        mean = sum_over_ranks(squares) / self.width
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight is split over the tensor group, as the heads are."""
        offset = dist.get_rank(groups.vision_group()) * len(self.weight)
        return {f"{prefix}weight": split_rows(f"{prefix}weight", self.weight, offset, self.width)}
