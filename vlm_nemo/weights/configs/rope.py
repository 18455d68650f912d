"""The rotary positions of config.json, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.model.config import LanguageConfig, RopeScaling
from vlm_nemo.weights.configs.forms import refuse


def read_rope(given: Mapping[str, Any], where: str, base: float) -> tuple[float, RopeScaling, list[int]]:
    """(base, stretching, M-RoPE sections): transformers 4 writes rope_theta and rope_scaling, transformers 5 both in
    rope_parameters. Raises UserError."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope = {"rope_theta": given.get("rope_theta", base), **(given.get(name) or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(where, f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], "it does 1.0")
    sections = list(rope.get("mrope_section") or [])
    if kind in ("default", "mrope", "dynamic"):  # dynamic begins beyond max_position_embeddings
        scaling = RopeScaling()
    elif kind == "linear":
        scaling = RopeScaling(kind="linear", factor=float(rope["factor"]))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_positions=int(rope["original_max_position_embeddings"]),
        )
    else:
        raise refuse(where, f"{name}.rope_type", kind, "it does 'default', 'linear', 'llama3'")
    return float(rope["rope_theta"]), scaling, sections


def write_scaling(cfg: LanguageConfig) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 has it."""
    scaling = cfg.rope_scaling
    if cfg.mrope_section:
        return {"type": "mrope", "mrope_section": list(cfg.mrope_section)}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return None
