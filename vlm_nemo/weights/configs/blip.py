"""BLIP-2 with a decoder of ours: config.json both ways. The published ones have OPT and T5, which we do not do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig
from vlm_nemo.weights.configs.common import Words, special_ids
from vlm_nemo.weights.configs.forms import demand
from vlm_nemo.weights.configs.languages import fitting_language, language_of, read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

LANGUAGES = ("llama", "qwen2", "mistral", "qwen3")
LAYOUT: dict[str, Any] = {"kind": "square", "aspect": "squash"}
FREE = frozenset(
    {
        "num_queries",
        "num_layers",
        "hidden_size",
        "num_heads",
        "ffn_hidden_size",
        "norm_eps",
        "cross_attention_every",
    }
)
"""Fields of the projector that a model may have in any way."""
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, layout=LayoutConfig(**LAYOUT))
    cfg.vision = read_tower("eva", config.get("vision_config") or {}, where)
    cfg.vision.feature_layer, cfg.vision.keep_class_token = -1, True
    text = {"model_type": "opt", **(config.get("text_config") or {})}
    cfg.language = read_language(language_of(text, LANGUAGES, where), text, where)
    q = {**_DEFAULTS, **(config.get("qformer_config") or {})}
    for name in ("hidden_act", "use_qformer_text_input"):
        demand(f"{where} (qformer)", q, name, (_DEFAULTS[name],))
    cfg.projector = ProjectorConfig(
        kind="qformer",
        num_queries=config.get("num_query_tokens", 32),
        num_layers=q["num_hidden_layers"],
        hidden_size=q["hidden_size"],
        num_heads=q["num_attention_heads"],
        ffn_hidden_size=q["intermediate_size"],
        norm_eps=float(q["layer_norm_eps"]),
        cross_attention_every=q["cross_attention_frequency"],
    )
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    p = cfg.projector
    width = p.hidden_size or cfg.language.hidden_size
    return {
        "image_token_index": words.image_id,
        "num_query_tokens": p.num_queries,
        "vision_config": write_tower("eva", cfg.vision),
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": width,
            "num_hidden_layers": p.num_layers,
            "num_attention_heads": p.num_heads,
            "intermediate_size": p.ffn_hidden_size or 4 * width,
            "hidden_act": "gelu",
            "layer_norm_eps": p.norm_eps,
            "cross_attention_frequency": p.cross_attention_every,
            "encoder_hidden_size": cfg.vision.hidden_size,
            "use_qformer_text_input": False,
        },
        "text_config": {
            **write_language(fitting_language(cfg.language, LANGUAGES)[0], cfg.language),
            **special_ids(words),
        },
        "use_decoder_only_language_model": True,
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }
