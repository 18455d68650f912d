"""The experts that a decoder's section of config.json says, both ways: Mixtral's, Qwen2-MoE's, Qwen3-MoE's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.model.config import LanguageConfig, MoeConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Of their classes, where a file leaves a field out; by the names of configs.languages.FORMS."""


def read_experts(name: str, given: Mapping[str, Any]) -> MoeConfig:
    """Of a decoder in DEFAULTS. What only training asks about (router_aux_loss_coef) is a recipe's to say."""
    said = {**DEFAULTS[name], **{key: value for key, value in given.items() if value is not None}}
    experts = said.get("num_local_experts") if name == "mixtral" else given.get("num_experts")
    if experts is None:  # transformers 5 has either name
        experts = said.get("num_local_experts", said["num_experts"])
    if name == "mixtral":
        return MoeConfig(experts=experts, top_k=said["num_experts_per_tok"])
    shared = name == "qwen2_moe"
    return MoeConfig(
        experts=experts,
        top_k=said["num_experts_per_tok"],
        norm_top_k=bool(said["norm_topk_prob"]),
        ffn_hidden_size=said["moe_intermediate_size"],
        shared_ffn_hidden_size=said["shared_expert_intermediate_size"] if shared else None,
        shared_gate=shared,
        every=said["decoder_sparse_step"],
        dense_layers=list(said["mlp_only_layers"]),
    )


def write_experts(name: str, moe: MoeConfig) -> dict[str, Any]:
    """The inverse; nothing of a dense decoder."""
    if name not in DEFAULTS:
        return {}
    if name == "mixtral":
        return {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}
    shared = {"shared_expert_intermediate_size": moe.shared_ffn_hidden_size} if name == "qwen2_moe" else {}
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        **shared,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
    }


def expert_misfits(name: str, cfg: LanguageConfig) -> list[tuple[str, Any, Any]]:
    """(field of ours, its value, what the class has) where a decoder's experts are not of this kind."""
    moe, mixtral, shared = cfg.moe, name == "mixtral", name == "qwen2_moe"
    found: list[tuple[str, Any, Any]] = []
    if name not in DEFAULTS:
        return [("moe.experts", moe.experts, None)] if moe.experts is not None else []
    if moe.experts is None:
        return [("moe.experts", None, "a number")]
    if mixtral and moe.ffn_hidden_size not in (None, cfg.ffn_hidden_size):
        found.append(("moe.ffn_hidden_size", moe.ffn_hidden_size, cfg.ffn_hidden_size))
    if not mixtral and moe.ffn_hidden_size is None:
        found.append(("moe.ffn_hidden_size", None, "a number"))
    if (moe.shared_ffn_hidden_size is not None) != shared:
        found.append(("moe.shared_ffn_hidden_size", moe.shared_ffn_hidden_size, "a number" if shared else None))
    if moe.shared_gate != shared:
        found.append(("moe.shared_gate", moe.shared_gate, shared))
    if mixtral:
        usual = {"norm_top_k": True, "every": 1, "dense_layers": []}
        found += [(f"moe.{k}", getattr(moe, k), v) for k, v in usual.items() if getattr(moe, k) != v]
    return found
