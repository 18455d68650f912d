"""Gemma 3: config.json both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig, ReduceConfig
from vlm_nemo.weights.configs.common import Words, special_ids, view_tokens
from vlm_nemo.weights.configs.forms import refuse
from vlm_nemo.weights.configs.languages import read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

PROJECTOR: dict[str, Any] = {"num_layers": 1, "bias": False, "norm": "gemma"}
LAYOUT: dict[str, Any] = {
    "kind": "square",
    "aspect": "squash",
    "resample": "bilinear",
    "before": "\n\n<start_of_image>",
    "after": "<end_of_image>\n\n",
}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, layout=LayoutConfig(**LAYOUT))
    cfg.vision = read_tower("siglip", config.get("vision_config") or {}, where)
    cfg.vision.feature_layer, cfg.vision.post_norm = -1, True
    text = {"model_type": "gemma3_text", **(config.get("text_config") or {})}
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    cfg.language = read_language("gemma3", text, where)
    cfg.language.image_attention = "bidirectional"
    tokens = config.get("mm_tokens_per_image", 256)
    side, wanted = cfg.vision.image_size // cfg.vision.patch_size, math.isqrt(tokens)
    if wanted**2 != tokens or wanted == 0 or side % wanted:
        raise refuse(where, "mm_tokens_per_image", tokens, f"it does squares whose side divides {side}")
    cfg.reduce = ReduceConfig(kind="average_pool", factor=side // wanted)
    cfg.projector = ProjectorConfig(**PROJECTOR, norm_eps=cfg.vision.norm_eps)
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    return {
        "image_token_index": words.image_id,
        "boi_token_index": words.special("<start_of_image>"),
        "eoi_token_index": words.special("<end_of_image>"),
        "mm_tokens_per_image": view_tokens(cfg),
        "vision_config": {**write_tower("siglip", cfg.vision), "vision_use_head": False},
        "text_config": write_language("gemma3", cfg.language),
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }
