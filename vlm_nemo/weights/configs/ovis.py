"""Ovis2: config.json both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig, ReduceConfig
from vlm_nemo.weights.configs.common import Words, special_ids
from vlm_nemo.weights.configs.forms import demand, refuse
from vlm_nemo.weights.configs.languages import fitting_language, language_of, read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

LANGUAGES = ("qwen2", "llama", "qwen3")
INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
"""The text's names of the visual vocabulary's last words, in its order."""
TOKENIZE = ("softmax", "gumbel_argmax", "st_argmax")
_OURS = {"softmax": "softmax", "gumbel_argmax": "gumbel", "st_argmax": "st_argmax"}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_stride": 1,
    "num_visual_indicator_tokens": 5,
    "tokenize_function": "softmax",
}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, layout=LayoutConfig(kind="ovis"))
    given = {**_DEFAULTS, **(config.get("vision_config") or {})}
    cfg.vision = read_tower("aimv2", given, where, "ovis2")
    cfg.vision.feature_layer = -1
    text = {"model_type": "qwen2", **(config.get("text_config") or {})}
    cfg.language = read_language(language_of(text, LANGUAGES, where), text, where)
    for name, value in (("hidden_size", cfg.language.hidden_size), ("vocab_size", cfg.language.vocab_size)):
        if config.get(name, value) != value:
            raise refuse(where, name, config[name], f"text_config has {value}")
    stride = int(given["hidden_stride"])
    cfg.reduce = ReduceConfig(kind="hidden_stride", factor=stride) if stride > 1 else ReduceConfig()
    demand(f"{where} (vision)", given, "num_visual_indicator_tokens", (len(INDICATORS),))
    demand(f"{where} (vision)", given, "tokenize_function", TOKENIZE)
    cfg.projector = ProjectorConfig(
        kind="visual_vocabulary",
        vocabulary=given["vocab_size"],
        tokenize=_OURS[given["tokenize_function"]],
    )
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    p = cfg.projector
    vision = {
        **write_tower("aimv2", cfg.vision, "ovis2"),
        "vocab_size": p.vocabulary,
        "hidden_stride": cfg.reduce.factor if cfg.reduce.kind != "none" else 1,
        "num_visual_indicator_tokens": p.indicators,
        "tokenize_function": next(theirs for theirs, ours in _OURS.items() if ours == p.tokenize),
    }
    return {
        "image_token_id": words.image_id,
        "visual_indicator_token_ids": [words.special(name) for name in INDICATORS],
        "hidden_size": cfg.language.hidden_size,
        "vocab_size": cfg.language.vocab_size,
        "vision_config": vision,
        "text_config": write_language(fitting_language(cfg.language, LANGUAGES)[0], cfg.language),
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }
