"""A model that the graphs cannot say is refused by the key that makes it so, before anything is written."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from tests import compositions
from tests.tiny import tiny_model
from vlm_nemo.export.covered import COVERED, check_covered
from vlm_nemo.model.config import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    ReduceConfig,
    RopeScaling,
    VisionConfig,
)
from vlm_nemo.types import UserError

SAID_BY_THE_GRAPHS = {
    "vision": "image_size patch_size hidden_size num_layers num_heads ffn_hidden_size norm_eps class_token "
    "keep_class_token pre_norm feature_layer mean std",
    "projector": "hidden_size",
    "language": "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim ffn_hidden_size norm_eps rope_base "
    "tied_embeddings max_positions",
}
"""What the graphs are built from, or what is compared with it."""
WITHOUT_EFFECT = {
    "vision": "rope_base position_init_std full_attention_layers global_layers",
    "reduce": "factor",
    "projector": "norm_place norm_eps num_queries num_heads num_kv_heads head_dim ffn_hidden_size "
    "cross_attention_every vocabulary indicators tokenize temperature",
    "language": "global_every",
    "rope_scaling": "factor low_freq_factor high_freq_factor original_positions",
}
"""What says nothing where the covered values stand."""


def test_every_switch_is_covered_or_known_to_say_nothing() -> None:
    """A new switch has to be decided about here: graphs that ignore it would compute another model."""
    parts = {
        "vision": VisionConfig,
        "reduce": ReduceConfig,
        "projector": ProjectorConfig,
        "language": LanguageConfig,
        "rope_scaling": RopeScaling,
    }
    for part, cls in parts.items():
        decided = {key.split(".")[-1] for key in COVERED if key.split(".")[-2] == part}
        decided |= {*SAID_BY_THE_GRAPHS.get(part, "").split(), *WITHOUT_EFFECT.get(part, "").split()}
        assert {field.name for field in fields(cls)} - {"rope_scaling"} == decided, part


def test_llava_s_shapes_pass() -> None:
    check_covered(ModelConfig())
    check_covered(tiny_model())


REFUSED: dict[str, Any] = {
    "layout.kind": "anyres",
    "vision.position": "rope",
    "vision.layer_scale": 0.1,
    "reduce.kind": "pixel_shuffle",
    "projector.kind": "qformer",
    "projector.num_layers": 3,
    "projector.newline": True,
    "projector.hidden_size": 7,
    "language.qkv_bias": True,
    "language.window": 4096,
    "language.head_dim": 256,
    "language.mrope_section": [16, 24, 24],
    "language.image_attention": "bidirectional",
}


@pytest.mark.parametrize("key", REFUSED)
def test_anything_else_is_named(key: str) -> None:
    part, name = key.split(".")
    cfg = ModelConfig()
    setattr(cfg, part, replace(getattr(cfg, part), **{name: REFUSED[key]}))
    with pytest.raises(UserError) as error:
        check_covered(cfg)
    words = str(error.value)
    assert f" model.{key}={REFUSED[key]};" in words and words.count("model.") == 1 and "\n" not in words


def test_all_keys_are_named_at_once() -> None:
    cfg = compositions.Composition(tower="siglip", reduction="merge", projector="mlp", language="qwen2").config()
    with pytest.raises(UserError, match="patch_bias=True, .*model.reduce.kind=merge, .*qkv_bias=True"):
        check_covered(cfg)
