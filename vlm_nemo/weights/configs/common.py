"""What every family's reader and writer of config.json shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Protocol

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.weights.configs.forms import refuse


class Words(Protocol):
    """What a configuration says of a tokenizer (`vlm_nemo.data.tokenizer.Tokenizer`)."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int

    def special(self, name: str) -> int:
        """The id of a special token. Raises UserError if there is none of that name."""
        ...


def special_ids(words: Words) -> dict[str, int | None]:
    """As config.json and generation_config.json name them."""
    return {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}


def feature_layer(top: Mapping[str, Any], where: str) -> int:
    """Which hidden state the projector sees. Raises UserError for several."""
    layer = top["vision_feature_layer"]
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        raise refuse(where, "vision_feature_layer", layer, "it takes the features of one layer")
    return layer


def view_tokens(cfg: ModelConfig) -> int:
    """Embeddings that one square view gives."""
    if cfg.projector.kind in ("qformer", "perceiver"):
        return cfg.projector.num_queries
    side = cfg.vision.image_size // cfg.vision.patch_size
    if cfg.reduce.kind != "none":
        side = -(-side // cfg.reduce.factor)
    return side**2 + int(cfg.vision.class_token and cfg.vision.keep_class_token)


def differing(
    section: Any, always: Mapping[str, Any], free: Sequence[str] | frozenset[str]
) -> list[tuple[str, Any, Any]]:
    """(field, its value, what it would be) of a section whose fields are `always`, free, or their defaults."""
    found = []
    for entry in fields(section):
        if entry.name in free:
            continue
        if entry.name in always:
            wanted = always[entry.name]
        elif entry.default is not MISSING:
            wanted = entry.default
        else:
            assert entry.default_factory is not MISSING
            wanted = entry.default_factory()
        value = getattr(section, entry.name)
        if value != wanted:
            found.append((entry.name, value, wanted))
    return found
