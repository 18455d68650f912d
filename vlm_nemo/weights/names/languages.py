"""The names of decoders, as they stand alone. One table: all of them are Llama with switches."""

from __future__ import annotations

from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.weights.names.rows import Row, Table, linear
from vlm_nemo.weights.transforms import GATE_UP, IDENTITY, KV, QKV

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
"""Ours: the two that have a row a token."""

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
"""Theirs."""

_O, _T = "language.decoder.layers.{layer}", "model.layers.{layer}"


def _looks(c: LanguageConfig, layer: int) -> bool:
    """Whether a layer looks at images."""
    return layer in c.cross_attention_layers


def _attends(c: LanguageConfig, layer: int) -> bool:
    return not _looks(c, layer)


DECODER = Table(
    rows=(
        Row(ours=EMBEDDING, theirs=(EMBEDDING_NAME,)),
        Row(ours=f"{_O}.input_layernorm.weight", theirs=(f"{_T}.input_layernorm.weight",)),
        *linear(
            f"{_O}.self_attention.linear_qkv",
            *(f"{_T}.self_attn.{x}_proj" for x in ("q", "k", "v")),
            transform=QKV,
            bias=lambda c: c.qkv_bias,
            layers=_attends,
        ),
        *(
            Row(
                ours=f"{_O}.self_attention.{x}_layernorm.weight",
                theirs=(f"{_T}.self_attn.{x}_norm.weight",),
                when=lambda c: c.qk_norm,
                layers=_attends,
            )
            for x in ("q", "k")
        ),
        Row(
            ours=f"{_O}.self_attention.linear_proj.weight",
            theirs=(f"{_T}.self_attn.o_proj.weight",),
            layers=_attends,
        ),
        *(
            Row(ours=f"{_O}.{ours}", theirs=tuple(f"{_T}.{name}" for name in theirs), transform=how, layers=_looks)
            for ours, theirs, how in (
                ("cross_attention.linear_q.weight", ("cross_attn.q_proj.weight",), IDENTITY),
                ("cross_attention.linear_kv.weight", ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"), KV),
                ("cross_attention.linear_proj.weight", ("cross_attn.o_proj.weight",), IDENTITY),
                ("cross_attention.q_layernorm.weight", ("cross_attn.q_norm.weight",), IDENTITY),
                ("cross_attention.k_layernorm.weight", ("cross_attn.k_norm.weight",), IDENTITY),
                ("attention_gate", ("cross_attn_attn_gate",), IDENTITY),
                ("mlp_gate", ("cross_attn_mlp_gate",), IDENTITY),
            )
        ),
        # Llama's post_attention_layernorm stands before the MLP; Gemma's behind the attention
        Row(
            ours=f"{_O}.pre_mlp_layernorm.weight",
            theirs=(f"{_T}.post_attention_layernorm.weight",),
            when=lambda c: not c.sandwich_norm,
        ),
        *(
            Row(ours=f"{_O}.{ours}.weight", theirs=(f"{_T}.{theirs}.weight",), when=lambda c: c.sandwich_norm)
            for ours, theirs in (
                ("post_attention_layernorm", "post_attention_layernorm"),
                ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
                ("post_mlp_layernorm", "post_feedforward_layernorm"),
            )
        ),
        Row(
            ours=f"{_O}.mlp.linear_fc1.weight",
            theirs=(f"{_T}.mlp.gate_proj.weight", f"{_T}.mlp.up_proj.weight"),
            transform=GATE_UP,
        ),
        Row(ours=f"{_O}.mlp.linear_fc2.weight", theirs=(f"{_T}.mlp.down_proj.weight",)),
        Row(ours="language.decoder.final_layernorm.weight", theirs=("model.norm.weight",)),
        Row(ours=HEAD, theirs=(HEAD_NAME,), when=lambda c: not c.tied_embeddings),
    ),
    idle=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
