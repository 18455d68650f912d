"""Tiny towers and projectors of every kind, as configurations. No transformers here: tensor ranks import this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_nemo.model.config import LanguageConfig, ModelConfig, ProjectorConfig, ReduceConfig, VisionConfig
from vlm_nemo.model.views import Grid

PATCH, SQUARE = 4, 20
"""Pixels: patches of 4, an image of 5 x 5."""


def vision(**given: Any) -> VisionConfig:
    sizes = dict(image_size=SQUARE, patch_size=PATCH, hidden_size=32, num_layers=3, num_heads=4, ffn_hidden_size=48)
    return VisionConfig(**{**sizes, **given})


SIGLIP = dict(class_token=False, patch_bias=True, pre_norm=False, activation="gelu_tanh", norm_eps=1e-6)
INTERNVIT = dict(patch_bias=True, pre_norm=False, layer_scale=0.1, activation="gelu", feature_layer=-1, norm_eps=1e-6)
QWEN = dict(class_token=False, pre_norm=False, position="rope", temporal_patch_size=2, feature_layer=-1, norm_eps=1e-6)
SWIGLU = dict(gated=True, activation="silu", norm="rmsnorm")

TOWERS = {
    "clip": vision(keep_class_token=True, feature_layer=-2),
    "clip_patches": vision(feature_layer=-1),
    "siglip": vision(**SIGLIP, post_norm=True, feature_layer=-1),
    "siglip_inner": vision(**SIGLIP, feature_layer=-2),
    "idefics3": vision(**SIGLIP, post_norm=True, feature_layer=-1),
    "internvit_300m": vision(**INTERNVIT),
    "internvit_6b": vision(**INTERNVIT, norm="rmsnorm", qk_norm=True, qkv_bias=False),
    "qwen2_vl": vision(**QWEN, activation="quick_gelu", ffn_hidden_size=64),
    "qwen2_5_vl": vision(**QWEN, **SWIGLU, window=4 * PATCH, full_attention_layers=[1]),
    "aimv2": vision(
        **SWIGLU,
        class_token=False,
        patch_bias=True,
        patch_norm=True,
        pre_norm=False,
        post_norm=True,
        feature_layer=-1,
        qkv_bias=False,
        bias=False,
    ),
    "eva": vision(
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        feature_layer=-1,
        keep_class_token=True,
        activation="gelu",
        norm_eps=1e-6,
    ),
    "plain": vision(class_token=False, pre_norm=False, position="none", activation="gelu", feature_layer=-1),
}


def grids_of(cfg: VisionConfig) -> list[Grid]:
    """Views of several sizes, neighbours of one size among them; even where the position is rotary, as Qwen's are."""
    return [(4, 6), (10, 6), (10, 6), (2, 2)] if cfg.position == "rope" else [(5, 5), (3, 4), (3, 4), (1, 7)]


def model(reduce: ReduceConfig | None = None, **projector: Any) -> ModelConfig:
    """A model whose projector takes features of 12 channels to 16."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=12, num_heads=2, class_token=False),
        reduce=reduce or ReduceConfig(),
        projector=ProjectorConfig(**projector),
        language=LanguageConfig(hidden_size=16),
    )


TWO = ReduceConfig(kind="pixel_shuffle", factor=2)
STRIDE = ReduceConfig(kind="hidden_stride", factor=2)
QUERIES = dict(num_queries=5, num_heads=2, ffn_hidden_size=24)
WORDS = dict(kind="visual_vocabulary", vocabulary=20, indicators=3)

PROJECTORS = {
    "linear": model(num_layers=1),
    "mlp": model(newline=True),
    "mlp_3": model(num_layers=3, hidden_size=24, activation="gelu_tanh"),
    "mlp_4": model(num_layers=4, hidden_size=24, bias=False),
    "internvl": model(TWO, norm="layernorm"),
    "idefics3": model(TWO, num_layers=1, bias=False),
    "qwen2_vl": model(
        ReduceConfig(kind="merge", factor=2), norm="layernorm", norm_place="patch", hidden_size=48, norm_eps=1e-6
    ),
    "qwen2_5_vl": model(
        ReduceConfig(kind="merge", factor=2), norm="rmsnorm", norm_place="patch", hidden_size=48, norm_eps=1e-6
    ),
    "gemma3": model(ReduceConfig(kind="average_pool", factor=2), num_layers=1, bias=False, norm="gemma", norm_eps=1e-6),
    "qformer": model(kind="qformer", num_layers=3, hidden_size=20, norm_eps=1e-12, **QUERIES),
    "qformer_every": model(kind="qformer", num_layers=2, cross_attention_every=1, num_queries=3, num_heads=4),
    "perceiver": model(
        kind="perceiver",
        num_layers=2,
        activation="silu",
        bias=False,
        norm_eps=1e-6,
        num_queries=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
    ),
    "perceiver_wider": model(TWO, kind="perceiver", num_layers=2, hidden_size=24, **QUERIES),
    "softmax": model(STRIDE, **WORDS),
    "st_argmax": model(STRIDE, **WORDS, tokenize="st_argmax"),
    "gumbel": model(STRIDE, **WORDS, tokenize="gumbel"),
    "cross_attention": model(kind="cross_attention"),
}
"""By what is new in each."""


def random_patches(grids: list[Grid]) -> Tensor:
    """[P, p*p*3] uint8"""
    count = sum(h * w for h, w in grids)
    return torch.randint(0, 256, (count, 3 * PATCH**2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def random_features(grids: list[Grid], width: int = 12) -> Tensor:
    """[N, D]"""
    return torch.randn(sum(h * w for h, w in grids), width, generator=torch.Generator().manual_seed(2))
