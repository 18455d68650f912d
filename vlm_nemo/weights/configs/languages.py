"""The decoders of config.json, both ways: in transformers 4's spelling, which the hub has and transformers 5 reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.weights.configs.experts import DEFAULTS as EXPERTS
from vlm_nemo.weights.configs.experts import expert_misfits, read_experts, write_experts
from vlm_nemo.weights.configs.forms import Field, Form, activation, demand, misfits, read_form, refuse, write_form
from vlm_nemo.weights.configs.rope import read_rope, write_scaling

_ROPE = frozenset({"rope_base", "rope_scaling"})
# Experts: see _more_misfits
_FREE = frozenset({"head_dim", "tied_embeddings", "image_attention", "moe"}) | _ROPE


def _fields(
    width: int,
    ffn: int,
    layers: int,
    heads: int,
    positions: int,
    eps: float,
    *,
    kv_heads: int | None,
    vocab: int,
    act: tuple[str, str] = ("hidden_act", "silu"),
) -> tuple[Field, ...]:
    read, write = activation(act[1])
    return (
        Field(ours="hidden_size", theirs="hidden_size", default=width),
        Field(ours="ffn_hidden_size", theirs="intermediate_size", default=ffn),
        Field(ours="num_layers", theirs="num_hidden_layers", default=layers),
        Field(ours="num_heads", theirs="num_attention_heads", default=heads),
        Field(ours="num_kv_heads", theirs="num_key_value_heads", default=kv_heads),
        Field(ours="vocab_size", theirs="vocab_size", default=vocab),
        Field(ours="max_positions", theirs="max_position_embeddings", default=positions),
        Field(ours="norm_eps", theirs="rms_norm_eps", default=eps, read=float),
        Field(ours="activation", theirs=act[0], default=act[1], read=read, write=write),
    )


_GELU = ("hidden_activation", "gelu_pytorch_tanh")
_QWEN = dict(use_sliding_window=(False,))
_QWEN_VL = Form(
    model_types=("qwen2_vl_text", "qwen2_vl", ""),
    fields=_fields(8192, 29568, 80, 64, 32768, 1e-5, kv_heads=8, vocab=152064),
    always=dict(qkv_bias=True),
    demands=_QWEN,
    says=("use_sliding_window",),
    free=_FREE | {"mrope_section"},
)

FORMS: dict[str, Form] = {
    "llama": Form(
        model_types=("llama", ""),
        fields=_fields(4096, 11008, 32, 32, 2048, 1e-6, kv_heads=None, vocab=32000),
        demands={"attention_bias": (False,), "mlp_bias": (False,)},
        says=("attention_bias", "mlp_bias"),
        free=_FREE,
    ),
    "mistral": Form(
        model_types=("mistral",),
        fields=(
            *_fields(4096, 14336, 32, 32, 131072, 1e-6, kv_heads=8, vocab=32000),
            Field(ours="window", theirs="sliding_window", default=4096),
        ),
        free=_FREE,
    ),
    "qwen2": Form(
        model_types=("qwen2",),
        fields=_fields(4096, 22016, 32, 32, 32768, 1e-6, kv_heads=32, vocab=151936),
        always=dict(qkv_bias=True),
        demands=_QWEN,
        says=("use_sliding_window",),
        free=_FREE,
    ),
    "qwen3": Form(
        model_types=("qwen3",),
        fields=_fields(4096, 22016, 32, 32, 32768, 1e-6, kv_heads=32, vocab=151936),
        always=dict(qk_norm=True),
        demands={**_QWEN, "attention_bias": (False,)},
        says=("use_sliding_window", "attention_bias"),
        free=_FREE,
    ),
    "mixtral": Form(
        model_types=("mixtral",),
        fields=(
            *_fields(4096, 14336, 32, 32, 131072, 1e-5, kv_heads=8, vocab=32000),
            Field(ours="window", theirs="sliding_window", default=None),
        ),
        demands={"router_jitter_noise": (0.0,)},
        free=_FREE,
    ),
    "qwen2_moe": Form(
        model_types=("qwen2_moe",),
        fields=_fields(2048, 5632, 24, 16, 32768, 1e-6, kv_heads=16, vocab=151936),
        always=dict(qkv_bias=True),
        demands={**_QWEN, "qkv_bias": (True,)},
        says=("use_sliding_window", "qkv_bias"),
        free=_FREE,
    ),
    "qwen3_moe": Form(
        model_types=("qwen3_moe",),
        fields=_fields(2048, 6144, 24, 32, 32768, 1e-6, kv_heads=4, vocab=151936),
        always=dict(qk_norm=True),
        demands={**_QWEN, "attention_bias": (False,)},
        says=("use_sliding_window", "attention_bias"),
        free=_FREE,
    ),
    "gemma3": Form(
        model_types=("gemma3_text",),
        fields=(
            *_fields(2304, 9216, 26, 8, 131072, 1e-6, kv_heads=4, vocab=262208, act=_GELU),
            Field(ours="window", theirs="sliding_window", default=4096),
        ),
        always=dict(qk_norm=True, norm_plus_one=True, sandwich_norm=True),
        demands={
            "attention_bias": (False,),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        says=("attention_bias", "final_logit_softcapping", "attn_logit_softcapping"),
        free=_FREE | {"global_every", "attention_scale", "rope_local_base", "embedding_scale"},
    ),
    "mllama": Form(
        model_types=("mllama_text_model", ""),
        fields=(
            *_fields(4096, 14336, 40, 32, 131072, 1e-5, kv_heads=8, vocab=128256),
            Field(
                ours="cross_attention_layers",
                theirs="cross_attention_layers",
                default=[3, 8, 13, 18, 23, 28, 33, 38],
                read=list,
            ),
        ),
        always=dict(input_tokens=8),
        demands={"tie_word_embeddings": (False,)},
        free=_FREE,
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": replace(_QWEN_VL, model_types=("qwen2_5_vl_text", "qwen2_5_vl", "")),
}
"""By the name that `families` uses."""

HEAD_DIMS: dict[str, int | None] = {
    "llama": None,
    "mistral": None,
    "qwen3": 128,
    "mixtral": None,
    "qwen3_moe": None,
    "gemma3": 256,
}
"""Of the decoders whose heads may be of another width than hidden_size / heads."""
TIED = {"gemma3"}
"""Decoders that share embedding and head where a file does not say."""
BASES = {"qwen2_vl": 1e6, "qwen2_5_vl": 1e6, "gemma3": 1e6, "mllama": 5e5, "mixtral": 1e6}
"""Of the rotary positions where a file does not say; 10000 elsewhere."""


def read_language(name: str, given: Mapping[str, Any], where: str) -> LanguageConfig:
    """Our configuration of a `text_config`. Raises UserError."""
    where += " (language)"
    given = dict(given)
    said = read_form(FORMS[name], given, where)
    if said["num_kv_heads"] is None:  # every query head has its own
        said["num_kv_heads"] = said["num_heads"]
    cfg = LanguageConfig(**said)
    cfg.head_dim = _head_dim(name, given, cfg, where)
    if name in EXPERTS:
        cfg.moe = read_experts(name, given)
    cfg.tied_embeddings = bool(given.get("tie_word_embeddings", name in TIED))
    if name == "gemma3":
        _read_gemma(given, cfg, where)
    else:
        kinds = given.get("layer_types") or []
        if any(kind != "full_attention" for kind in kinds):
            raise refuse(where, "layer_types", kinds, "it does 'full_attention' in all layers")
        cfg.rope_base, cfg.rope_scaling, sections = read_rope(given, where, BASES.get(name, 10000.0))
        if name in ("qwen2_vl", "qwen2_5_vl"):
            cfg.mrope_section = sections or [16, 24, 24]
    return cfg


def write_language(name: str, cfg: LanguageConfig) -> dict[str, Any]:
    """The `text_config` of a decoder."""
    found = {
        **write_form(FORMS[name], cfg),
        **write_experts(name, cfg.moe),
        "rope_theta": cfg.rope_base,
        "rope_scaling": write_scaling(cfg),
        "tie_word_embeddings": cfg.tied_embeddings,
    }
    if name in HEAD_DIMS and (cfg.head_dim is not None or HEAD_DIMS[name] is not None):
        found["head_dim"] = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    if name == "gemma3":
        head = cfg.head_dim or cfg.hidden_size // cfg.num_heads
        scale = cfg.attention_scale or head**-0.5
        power = round(scale**-2, 6)
        found |= {
            "query_pre_attn_scalar": int(power) if power == int(power) else power,
            "sliding_window_pattern": cfg.global_every,
            "rope_local_base_freq": cfg.rope_local_base,
        }
    return found


def language_of(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> str:
    """The decoder that a `text_config` describes, by its model_type. Raises UserError for one that is not allowed."""
    kind = given.get("model_type", "")
    for name in allowed:
        if kind in FORMS[name].model_types:
            return name
    names = ", ".join(repr(FORMS[name].model_types[0]) for name in allowed)
    raise refuse(f"{where} (language)", "model_type", kind, f"it does {names}")


def fitting_language(cfg: LanguageConfig, allowed: Sequence[str]) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Of the decoders allowed the one that a model's is, and where it still differs: the least of them."""
    found = [(name, misfits(FORMS[name], cfg) + _more_misfits(name, cfg)) for name in allowed]
    return min(found, key=lambda pair: len(pair[1]))


def _more_misfits(name: str, cfg: LanguageConfig) -> list[tuple[str, Any, Any]]:
    found = expert_misfits(name, cfg)
    if name not in HEAD_DIMS and cfg.head_dim not in (None, cfg.hidden_size // cfg.num_heads):
        found.append(("head_dim", cfg.head_dim, cfg.hidden_size // cfg.num_heads))
    if name in ("qwen2_vl", "qwen2_5_vl") and not cfg.mrope_section:
        found.append(("mrope_section", cfg.mrope_section, "three numbers"))
    if name == "mllama" and cfg.tied_embeddings:  # its head has fewer rows
        found.append(("tied_embeddings", True, False))
    if name == "gemma3":
        if cfg.embedding_scale != math.sqrt(cfg.hidden_size):
            found.append(("embedding_scale", cfg.embedding_scale, math.sqrt(cfg.hidden_size)))
        for key in ("global_every", "rope_local_base", "window"):
            if getattr(cfg, key) is None:
                found.append((key, None, "a number"))
        if cfg.rope_scaling.kind == "llama3":
            found.append(("rope_scaling.kind", "llama3", "linear"))
    return found


def _head_dim(name: str, given: Mapping[str, Any], cfg: LanguageConfig, where: str) -> int | None:
    """None where it is hidden_size / heads."""
    plain = cfg.hidden_size // cfg.num_heads
    said = given.get("head_dim") or HEAD_DIMS.get(name)
    if said is None or said == plain:
        return None
    if name not in HEAD_DIMS:
        raise refuse(where, "head_dim", said, f"it does hidden_size / heads = {plain}")
    return int(said)


def _read_gemma(given: Mapping[str, Any], cfg: LanguageConfig, where: str) -> None:
    config = {"query_pre_attn_scalar": 256, **given}
    cfg.global_every = given.get("sliding_window_pattern") or given.get("_sliding_window_pattern") or 6
    usual = [
        "full_attention" if (layer + 1) % cfg.global_every == 0 else "sliding_attention"
        for layer in range(cfg.num_layers)
    ]
    if given.get("layer_types") not in (None, usual):
        raise refuse(where, "layer_types", given["layer_types"], f"it does every {cfg.global_every}th layer full")
    head = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    scalar = config["query_pre_attn_scalar"]
    cfg.attention_scale = None if scalar == head else scalar**-0.5
    cfg.embedding_scale = math.sqrt(cfg.hidden_size)
    nested = given.get("rope_parameters") or {}
    full, local = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    plain = {key: value for key, value in given.items() if key != "rope_parameters"}
    if full:
        plain["rope_parameters"] = full
    cfg.rope_base, cfg.rope_scaling, _ = read_rope(plain, where, BASES["gemma3"])
    demand(where, {"rope_type": "default", **local}, "rope_type", ("default",))
    cfg.rope_local_base = float(local.get("rope_theta", given.get("rope_local_base_freq", 10000.0)))
