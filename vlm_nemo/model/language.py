"""The language model: a Llama-style decoder, megatron-core's GPTModel with our attention and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.model.transformer import block_spec, transformer_config
from vlm_nemo.runtime.config import ParallelConfig


class Decoder(GPTModel):
    """GPTModel that computes the logits of a generation step at the last token of every row only."""

    def _postprocess(self, hidden_states: Tensor, *, packed_seq_params: Any = None, **given: Any) -> Tensor:
        if self.post_process and isinstance(packed_seq_params, CachedStep):
            hidden_states = hidden_states[packed_seq_params.last]
        return super()._postprocess(hidden_states, packed_seq_params=packed_seq_params, **given)


def language_config(
    cfg: LanguageConfig, parallel: ParallelConfig, dtype: torch.dtype, extra: Mapping[str, Any]
) -> TransformerConfig:
    """megatron's config of the decoder."""
    rotary = cfg.hidden_size // cfg.num_heads // 2
    return transformer_config(
        parallel,
        dtype,
        pipelined=True,
        extra=extra,
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_heads,
        num_query_groups=cfg.num_kv_heads,
        ffn_hidden_size=cfg.ffn_hidden_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=cfg.norm_eps,
        add_bias_linear=False,
        # "mrope" hands our position ids to the rotary table, so positions restart in every sample without a sync;
        # with three equal rows it is ordinary RoPE, whatever the sections.
        mrope_section=[rotary, 0, 0],
    )


def language_model(
    cfg: LanguageConfig, config: TransformerConfig, *, first: bool, last: bool, vp_stage: int | None
) -> Decoder:
    """One pipeline stage (or virtual chunk) of the decoder. first holds the embedding, last the head."""
    return Decoder(
        config,
        block_spec(get_num_layers_to_build(config, vp_stage=vp_stage), AttnMaskType.causal),
        vocab_size=cfg.vocab_size,
        max_sequence_length=cfg.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=cfg.tied_embeddings,
        position_embedding_type="mrope",
        rotary_base=cfg.rope_base,
        # Image embeddings are merged in before the sequence is scattered; VLM does both.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
