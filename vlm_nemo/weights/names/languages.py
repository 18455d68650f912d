"""The names of decoders, as they stand alone. One table: all are Llama with switches, but for Mixtral's experts.

Experts are named one by one, as the hub has them and as save_pretrained writes them; in memory transformers 5 joins
those of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.weights.names.rows import EXPERT, Row, Table, linear
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


def _mlp(ours: str, theirs: str, layers: Callable[[Any, int], bool]) -> tuple[Row, Row]:
    """The rows of a gated MLP, or of an expert."""
    gate, up, down = (f"{theirs}{word}_proj.weight" for word in ("gate", "up", "down"))
    return (
        Row(ours=f"{_O}.{ours}.linear_fc1.weight", theirs=(gate, up), transform=GATE_UP, layers=layers),
        Row(ours=f"{_O}.{ours}.linear_fc2.weight", theirs=(down,), layers=layers),
    )


def _shared(cfg: LanguageConfig, layer: int) -> bool:
    return cfg.moe.sparse(layer) and cfg.moe.shared_ffn_hidden_size is not None


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
        *_mlp("mlp", f"{_T}.mlp.", layers=lambda c, n: not c.moe.sparse(n)),
        Row(
            ours=f"{_O}.mlp.router.weight",
            theirs=(f"{_T}.mlp.gate.weight",),
            layers=lambda c, n: c.moe.sparse(n),
        ),
        *_mlp(f"mlp.experts.{EXPERT}", f"{_T}.mlp.experts.{EXPERT}.", layers=lambda c, n: c.moe.sparse(n)),
        *_mlp("mlp.shared_experts", f"{_T}.mlp.shared_expert.", layers=_shared),
        Row(
            ours=f"{_O}.mlp.shared_experts.gate_weight",
            theirs=(f"{_T}.mlp.shared_expert_gate.weight",),
            layers=lambda c, n: _shared(c, n) and c.moe.shared_gate,
        ),
        Row(ours="language.decoder.final_layernorm.weight", theirs=("model.norm.weight",)),
        Row(ours=HEAD, theirs=(HEAD_NAME,), when=lambda c: not c.tied_embeddings),
    ),
    idle=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)


def _mixtral(row: Row) -> Row:
    """Llama's row, or Mixtral's where it is of experts."""
    words = {f"{_T}.mlp.{ours}": f"{_T}.block_sparse_moe.{theirs}" for ours, theirs in _MIXTRAL.items()}
    return replace(row, theirs=tuple(words.get(name, name) for name in row.theirs))


_MIXTRAL = {
    "gate.weight": "gate.weight",
    f"experts.{EXPERT}.gate_proj.weight": f"experts.{EXPERT}.w1.weight",
    f"experts.{EXPERT}.up_proj.weight": f"experts.{EXPERT}.w3.weight",
    f"experts.{EXPERT}.down_proj.weight": f"experts.{EXPERT}.w2.weight",
}

DECODERS = {"mixtral": replace(DECODER, rows=tuple(_mixtral(row) for row in DECODER.rows))}
"""By the name that `configs.languages` uses: those that are not spelled as DECODER is."""


def decoder_names(kind: str) -> Table:
    """Of a kind of decoder in configs.languages.FORMS."""
    return DECODERS.get(kind, DECODER)
