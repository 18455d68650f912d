"""Qwen2-VL and Qwen2.5-VL: config.json both ways, flat as the hub has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig, ReduceConfig
from vlm_nemo.weights.configs.common import Words, special_ids
from vlm_nemo.weights.configs.forms import refuse
from vlm_nemo.weights.configs.languages import read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

NORMS = {"qwen2_vl": "layernorm", "qwen2_5_vl": "rmsnorm"}
LAYOUT: dict[str, Any] = {"kind": "native", "before": "<|vision_start|>", "after": "<|vision_end|>"}
_WIDTH = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size"}
"""What a vision_config calls the width of the language model."""


def projector_switches(family: str, vision_width: int, factor: int) -> dict[str, Any]:
    """The merger: a norm of single patches, then two layers as wide as what is merged."""
    return {
        "norm": NORMS[family],
        "norm_place": "patch",
        "norm_eps": 1e-6,
        "hidden_size": vision_width * factor**2,
    }


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, layout=LayoutConfig(**LAYOUT))
    vision = config.get("vision_config") or {}
    cfg.vision = read_tower(family, vision, where)
    cfg.vision.feature_layer = -1
    text = config.get("text_config") or {key: value for key, value in config.items() if key != "vision_config"}
    text = {**text, "model_type": family}
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    cfg.language = read_language(family, text, where)
    width = vision.get(_WIDTH[family], 3584)
    if width != cfg.language.hidden_size:
        only = f"the language model takes {cfg.language.hidden_size}"
        raise refuse(f"{where} (vision)", _WIDTH[family], width, only)
    cfg.reduce = ReduceConfig(kind="merge", factor=int(vision.get("spatial_merge_size", 2)))
    cfg.projector = ProjectorConfig(**projector_switches(family, cfg.vision.hidden_size, cfg.reduce.factor))
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    vision = {
        **write_tower(family, cfg.vision),
        "model_type": family,
        _WIDTH[family]: cfg.language.hidden_size,
        "in_channels": 3,
        "in_chans": 3,
        "spatial_merge_size": cfg.reduce.factor,
    }
    return {
        **{key: value for key, value in write_language(family, cfg.language).items() if key != "model_type"},
        "image_token_id": words.image_id,
        "video_token_id": words.special("<|video_pad|>"),
        "vision_start_token_id": words.special("<|vision_start|>"),
        "vision_end_token_id": words.special("<|vision_end|>"),
        "vision_config": vision,
        **special_ids(words),
    }
