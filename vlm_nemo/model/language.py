"""The language model: megatron-core's GPTModel with our attention, norms and rotary positions.

Llama by default; the switches of LanguageConfig make Mistral, Mixtral, Qwen 2 and 3, Gemma 3 of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.model.cross_attention import looking_layer
from vlm_nemo.model.experts import expect, experts_config, sparse_layer
from vlm_nemo.model.head import Head, Targets
from vlm_nemo.model.kernels import PLAIN, Kernels
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.rope import Rotary
from vlm_nemo.model.segments import Segments
from vlm_nemo.model.stages import chunk_layers, layout
from vlm_nemo.model.transformer import ACTIVATIONS, block_spec, transformer_config
from vlm_nemo.runtime.config import ParallelConfig


class DecoderLayer(TransformerLayer):
    """A layer that turns by the table of its kind (global or local), tells its experts which samples the
    row holds, and, with sandwich, norms what attention and MLP give before it is added (Gemma 3)."""

    def __init__(self, *given: Any, sandwich: bool, **named: Any) -> None:
        super().__init__(*given, **named)
        config = self.config
        self.local = int(is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number))
        self.sandwich = sandwich
        if sandwich:
            self.post_attention_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
            self.post_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *given: Any, packed_seq_params: Any, **named: Any) -> Any:
        expect(self.mlp, packed_seq_params.balance if isinstance(packed_seq_params, Segments) else None)
        return super().forward(*given, packed_seq_params=packed_seq_params, **named)

    def _forward_attention(self, hidden_states: Tensor, *, rotary_pos_emb: Tensor, **given: Any) -> tuple[Tensor, Any]:
        if rotary_pos_emb.dim() == 5:
            rotary_pos_emb = rotary_pos_emb[self.local]
        if not self.sandwich:
            return super()._forward_attention(hidden_states, rotary_pos_emb=rotary_pos_emb, **given)
        out, bias = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=given["packed_seq_params"],
        )
        assert bias is None, "a bias would have to be normed too"
        return hidden_states + self.post_attention_layernorm(out), given.get("context")

    def _forward_post_mlp(self, mlp_output_with_bias: tuple[Tensor, None], residual: Tensor) -> Tensor:
        if self.sandwich:
            out, bias = mlp_output_with_bias
            assert bias is None, "a bias would have to be normed too"
            mlp_output_with_bias = self.post_mlp_layernorm(out), None
        return super()._forward_post_mlp(mlp_output_with_bias, residual)


class Decoder(GPTModel):
    """GPTModel with our rotary positions and scaled embeddings, that computes the loss of supervised tokens only, and
    the logits of a generation step at the last token of every row only."""

    def __init__(self, cfg: LanguageConfig, config: TransformerConfig, **given: Any) -> None:
        super().__init__(config, **given)
        if self.pre_process and cfg.input_tokens:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=cfg.vocab_size + cfg.input_tokens,
                max_sequence_length=cfg.max_positions,
                position_embedding_type=self.position_embedding_type,
                scatter_to_sequence_parallel=False,
                tp_group=self.pg_collection.tp,
            )
            self.setup_embeddings_and_output_layer()
        self.rotary_pos_emb = Rotary(cfg, config.kv_channels, config.params_dtype)
        if self.post_process:  # GPTModel takes no spec for it; Head has no state of its own
            self.output_layer.__class__ = Head
        # Rounded as the embeddings are: Gemma was trained with 50.5 for sqrt(2560) in bf16
        self.embedding_scale = torch.tensor(cfg.embedding_scale).to(config.params_dtype).item()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[1, T] -> [T, 1, D]: the embeddings of text, before any image is placed among them."""
        x = self.embedding(input_ids=tokens, position_ids=positions)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Targets | None, packed_seq_params: Any = None, **given: Any
    ) -> Tensor:
        if self.post_process and labels is not None:
            shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
            return self.output_layer(hidden_states, shared, targets=labels)[0]
        if self.post_process and isinstance(packed_seq_params, CachedStep):
            hidden_states = hidden_states[packed_seq_params.last]
        return super()._postprocess(hidden_states, labels=None, packed_seq_params=packed_seq_params, **given)


def language_config(
    cfg: LanguageConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    extra: Mapping[str, Any],
    kernels: Kernels = PLAIN,
    fp8: str = "none",
) -> TransformerConfig:
    """megatron's config of the decoder."""
    cut = layout(chunk_layers(cfg.num_layers, parallel)) if parallel.pipeline > 1 else None
    return transformer_config(
        parallel,
        dtype,
        pipelined=True,
        recompute=parallel.recompute,
        kernels=kernels,
        fp8=None if fp8 == "none" else fp8,
        extra=extra,
        num_layers=cfg.num_layers,
        pipeline_model_parallel_layout=cut,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_heads,
        num_query_groups=cfg.num_kv_heads,
        kv_channels=cfg.head_dim,
        ffn_hidden_size=cfg.ffn_hidden_size,
        activation_func=ACTIVATIONS[cfg.activation],
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=cfg.norm_eps,
        layernorm_zero_centered_gamma=cfg.norm_plus_one,
        add_bias_linear=False,
        add_qkv_bias=cfg.qkv_bias,
        # Also: sum the gradients of these norms over the tensor group, whose ranks see other heads
        qk_layernorm=cfg.qk_norm or bool(cfg.cross_attention_layers),
        softmax_scale=cfg.attention_scale,
        window_size=None if cfg.window is None else (cfg.window - 1, 0),
        window_attn_skip_freq=cfg.global_every,
        # Looked for where positions are "mrope"; Rotary has its own.
        mrope_section=list(cfg.mrope_section),
        # Features travel behind the hidden states, as many as a row has; megatron asks for alltoall then
        variable_seq_lengths=bool(cfg.cross_attention_layers) and parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall" if cfg.moe.experts is None else "allgather",
        **experts_config(cfg, parallel),
    )


def language_model(
    cfg: LanguageConfig,
    config: TransformerConfig,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None,
    kernels: Kernels = PLAIN,
) -> Decoder:
    """One pipeline stage (or virtual chunk) of the decoder. first holds the embedding, last the head."""
    here = get_num_layers_to_build(config, vp_stage=vp_stage)
    plain = not cfg.sandwich_norm and cfg.rope_local_base is None and cfg.moe.experts is None
    layers = block_spec(
        here,
        AttnMaskType.causal,
        module=TransformerLayer if plain else DecoderLayer,
        params={} if plain else {"sandwich": cfg.sandwich_norm},
        head_norm=cfg.qk_norm,
        kernels=kernels,
    )
    before = get_transformer_layer_offset(config, vp_stage)
    for n in range(here):
        if before + n in cfg.cross_attention_layers:
            layers.layer_specs[n] = looking_layer()
        elif cfg.moe.sparse(before + n):
            layers.layer_specs[n] = sparse_layer(layers.layer_specs[n])
    return Decoder(
        cfg,
        config,
        transformer_layer_spec=layers,
        vocab_size=cfg.vocab_size,
        max_sequence_length=cfg.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=cfg.tied_embeddings,
        # Hands our position ids to the rotary table, so that positions restart in every sample without a sync
        position_embedding_type="mrope",
        # Image embeddings are merged in before the sequence is scattered; VLM does both.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
