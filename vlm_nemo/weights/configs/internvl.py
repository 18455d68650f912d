"""InternVL 2.5 and 3: config.json both ways, as transformers has it; OpenGVLab's own is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig, ReduceConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights.configs.common import Words, feature_layer, special_ids, view_tokens
from vlm_nemo.weights.configs.forms import demand, refuse
from vlm_nemo.weights.configs.languages import fitting_language, language_of, read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

LANGUAGES = ("qwen2", "llama", "qwen3", "qwen3_moe")

DEFAULTS: dict[str, Any] = {
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
}
PROJECTOR: dict[str, Any] = {"norm": "layernorm"}
LAYOUT: dict[str, Any] = {"kind": "tiles", "before": "<img>", "after": "</img>"}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    top = {**DEFAULTS, **config}
    cfg = ModelConfig(family=family, layout=LayoutConfig(**LAYOUT))
    cfg.vision = read_tower("internvit", config.get("vision_config") or {}, where)
    cfg.vision.feature_layer = feature_layer(top, where)
    cfg.vision.keep_class_token = False
    demand(where, top, "vision_feature_select_strategy", ("default",))
    text = {"model_type": "qwen2", **(config.get("text_config") or {})}
    cfg.language = read_language(language_of(text, LANGUAGES, where), text, where)
    cfg.reduce = _reduce(top["downsample_ratio"], where)
    demand(where, top, "projector_hidden_act", ("gelu",))
    cfg.projector = ProjectorConfig(**PROJECTOR)
    return cfg


def _reduce(ratio: float, where: str) -> ReduceConfig:
    if ratio not in (1.0, 0.5, 0.25):
        raise refuse(where, "downsample_ratio", ratio, "it does 1.0, 0.5, 0.25")
    return ReduceConfig(kind="pixel_shuffle", factor=round(1 / ratio))


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    return {
        "image_token_id": words.image_id,
        "image_seq_length": view_tokens(cfg),
        "downsample_ratio": 1 / cfg.reduce.factor,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": cfg.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "vision_config": write_tower("internvit", cfg.vision),
        "text_config": write_language(fitting_language(cfg.language, LANGUAGES)[0], cfg.language),
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }


def read_remote(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """OpenGVLab's InternVLChatModel. Raises UserError naming a field and its value."""
    top = {"downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "use_thumbnail": True, **config}
    vision = dict(config.get("vision_config") or {})
    demand(where, {"drop_path_rate": 0.0, "use_flash_attn": True, **top}, "ps_version", ("v2",))
    given = {
        **{key: vision[key] for key in _REMOTE_SAME if key in vision},
        "model_type": "internvl_vision",
        "attention_bias": vision.get("qkv_bias", True),
        "use_qk_norm": vision.get("qk_normalization", True),
        "layer_scale_init_value": vision.get("initializer_factor", 0.1),
    }
    text = dict(config.get("llm_config") or config.get("text_config") or {})
    if not text:
        raise UserError(f"{where} has no llm_config; copy the folder again")
    return read(
        family,
        {
            "vision_config": given,
            "text_config": text,
            "downsample_ratio": top["downsample_ratio"],
            "vision_feature_layer": top["select_layer"],
            "tie_word_embeddings": text.get("tie_word_embeddings", False),
        },
        where,
    )


_REMOTE_SAME = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "norm_type",
    "layer_norm_eps",
    "hidden_act",
    "num_channels",
)
