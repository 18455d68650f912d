"""Idefics3 and SmolVLM: config.json both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig, ReduceConfig
from vlm_nemo.weights.configs.common import Words, special_ids
from vlm_nemo.weights.configs.languages import fitting_language, language_of, read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

LANGUAGES = ("llama", "qwen2", "mistral")
PROJECTOR: dict[str, Any] = {"num_layers": 1, "bias": False}
LAYOUT: dict[str, Any] = {"kind": "rows", "resample": "lanczos"}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, projector=ProjectorConfig(**PROJECTOR))
    cfg.vision = read_tower("siglip", config.get("vision_config") or {}, where, family)
    cfg.vision.feature_layer, cfg.vision.post_norm = -1, True
    text = {"model_type": "llama", "rms_norm_eps": 1e-5, **(config.get("text_config") or {})}
    cfg.language = read_language(language_of(text, LANGUAGES, where), text, where)
    cfg.reduce = ReduceConfig(kind="pixel_shuffle", factor=int(config.get("scale_factor", 2)))
    cfg.layout = LayoutConfig(**LAYOUT, longest_edge=4 * cfg.vision.image_size)
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    return {
        "image_token_id": words.image_id,
        "scale_factor": cfg.reduce.factor,
        "vision_config": write_tower("siglip", cfg.vision, family),
        "text_config": {
            **write_language(fitting_language(cfg.language, LANGUAGES)[0], cfg.language),
            **special_ids(words),
        },
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }
