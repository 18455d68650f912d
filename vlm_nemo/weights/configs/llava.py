"""LLaVA, LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: config.json both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig
from vlm_nemo.weights.configs.common import Words, feature_layer, special_ids, view_tokens
from vlm_nemo.weights.configs.forms import activation, demand, refuse
from vlm_nemo.weights.configs.languages import fitting_language, language_of, read_language, write_language
from vlm_nemo.weights.configs.towers import fitting_tower, read_tower, tower_of, write_tower

TOWERS = ("clip", "siglip")
LANGUAGES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "qwen2_moe", "qwen3_moe")

LLAVA_DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_SIDES = [384, 768, 1152, 1536, 1920, 2304]
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": LLAVA_DEFAULTS,
    "llava_next": {**LLAVA_DEFAULTS, "image_grid_pinpoints": PINPOINTS},
    "llava_onevision": {
        **LLAVA_DEFAULTS,
        "image_token_index": 151646,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
        "vision_aspect_ratio": "anyres_max_9",
    },
}
ONEVISION_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}
"""Where a OneVision's config.json has no vision_config at all."""

_ANYRES_MAX = "anyres_max_"
_READ_ACT, _WRITE_ACT = activation("gelu", "quick_gelu", "gelu_pytorch_tanh")


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    top = {**DEFAULTS[family], **config}
    cfg = ModelConfig(family=family)
    vision, text = config.get("vision_config"), config.get("text_config") or {}
    if vision is None and family == "llava_onevision":
        cfg.vision = read_tower("siglip", ONEVISION_TOWER, where)
    elif vision is None:
        cfg.vision = read_tower("clip", {}, where, "llava")
    else:
        cfg.vision = read_tower(tower_of(vision, TOWERS), vision, where)
    if text.get("model_type") is None and family == "llava_onevision":
        text = {**text, "model_type": "qwen2"}
    cfg.language = read_language(language_of(text, LANGUAGES, where), text, where)
    cfg.vision.feature_layer = feature_layer(top, where)
    chosen = demand(where, top, "vision_feature_select_strategy", ("default", "full"))
    if chosen == "default" and not cfg.vision.class_token:
        only = "a tower without class token gives all its patches: 'full'"
        raise refuse(where, "vision_feature_select_strategy", chosen, only)
    cfg.vision.keep_class_token = chosen == "full" and cfg.vision.class_token
    cfg.projector = _projector(family, top, where)
    cfg.layout = LayoutConfig(kind="square", aspect="crop")
    if family != "llava":
        pinpoints = [list(pair) for pair in top["image_grid_pinpoints"]]
        cfg.layout = LayoutConfig(
            kind="anyres",
            pinpoints=pinpoints,
            max_unpadded=_max_unpadded(top, where),
            tiles_if_alone=family == "llava_onevision",
        )
    return cfg


def _projector(family: str, top: Mapping[str, Any], where: str) -> ProjectorConfig:
    bias, newline = bool(top["multimodal_projector_bias"]), family != "llava"
    act = demand(where, top, "projector_hidden_act", ("gelu", "quick_gelu", "gelu_pytorch_tanh", "linear"))
    if act == "linear":
        return ProjectorConfig(num_layers=1, bias=bias, newline=newline)
    return ProjectorConfig(num_layers=2, activation=_READ_ACT(act), bias=bias, newline=newline)


def _max_unpadded(top: Mapping[str, Any], where: str) -> int | None:
    """anyres_max_9 -> 9"""
    said = top.get("vision_aspect_ratio")
    if said is None:
        return None
    number = str(said).removeprefix(_ANYRES_MAX)
    if not str(said).startswith(_ANYRES_MAX) or not number.isdigit():
        raise refuse(where, "vision_aspect_ratio", said, "it does 'anyres_max_N'")
    return int(number)


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    v, p = cfg.vision, cfg.projector
    found: dict[str, Any] = {
        "ignore_index": -100,
        "image_token_index": words.image_id,
        "image_seq_length": view_tokens(cfg),
        # A linear projector is one of two layers of which the second changes nothing
        "projector_hidden_act": "linear" if p.num_layers == 1 else _WRITE_ACT(p.activation),
        "multimodal_projector_bias": p.bias,
        "vision_feature_layer": v.feature_layer,
        "vision_feature_select_strategy": "default" if v.class_token and not v.keep_class_token else "full",
        "vision_config": write_tower(fitting_tower(v, TOWERS)[0], v),
        "text_config": {**write_language(fitting_language(cfg.language, LANGUAGES)[0], cfg.language)},
        "vocab_size": cfg.language.vocab_size,
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **special_ids(words),
    }
    if family != "llava":
        found["image_grid_pinpoints"] = [list(pair) for pair in cfg.layout.pinpoints]
    if family == "llava_onevision":
        # The processor of the other families has no other way; a very large number is never reached
        found["vision_aspect_ratio"] = f"{_ANYRES_MAX}{cfg.layout.max_unpadded or 10**6}"
    if not v.class_token:
        found["vision_config"]["vision_use_head"] = False
    return found
