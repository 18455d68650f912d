"""Llama 3.2 Vision: config.json both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig, ProjectorConfig
from vlm_nemo.model.tiles import tilings
from vlm_nemo.weights.configs.common import Words, special_ids
from vlm_nemo.weights.configs.forms import demand, refuse
from vlm_nemo.weights.configs.languages import read_language, write_language
from vlm_nemo.weights.configs.towers import read_tower, write_tower

PROJECTOR: dict[str, Any] = {"kind": "cross_attention", "num_layers": 1}


def read(family: str, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises UserError naming a field and its value."""
    cfg = ModelConfig(family=family, projector=ProjectorConfig(**PROJECTOR))
    given = config.get("vision_config") or {}
    cfg.vision = read_tower("mllama", given, where)
    cfg.vision.feature_layer, cfg.vision.keep_class_token = -1, True
    tiles, side = cfg.vision.tiles, f"{where} (vision)"
    if not isinstance(tiles, int) or tiles < 1:
        raise refuse(side, "max_num_tiles", tiles, "it does a number from 1")
    usual: dict[str, Any] = {"supported_aspect_ratios": _ratios(tiles), "vision_output_dim": cfg.vision.feature_size}
    said = {name: value if given.get(name) is None else given[name] for name, value in usual.items()}
    said["supported_aspect_ratios"] = [list(pair) for pair in said["supported_aspect_ratios"]]
    for name, value in usual.items():
        demand(side, said, name, (value,))
    cfg.language = read_language("mllama", config.get("text_config") or {}, where)
    cfg.layout = LayoutConfig(kind="canvas", max_tiles=tiles, resample="bilinear")
    return cfg


def write(family: str, cfg: ModelConfig, words: Words) -> dict[str, Any]:
    """config.json of a model that the family fits."""
    assert cfg.vision.tiles is not None
    vision = {
        **write_tower("mllama", cfg.vision),
        "supported_aspect_ratios": _ratios(cfg.vision.tiles),
        "vision_output_dim": cfg.vision.feature_size,
    }
    return {
        "image_token_index": words.image_id,
        "vision_config": vision,
        "text_config": {**write_language("mllama", cfg.language), **special_ids(words)},
        **special_ids(words),
    }


def _ratios(tiles: int) -> list[list[int]]:
    """Rows and columns, in the order of their numbers."""
    return [list(pair) for pair in tilings(tiles)]
