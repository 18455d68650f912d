"""A tiny model of the same structure as a given one: every switch kept, every size small. For tests and rehearsals."""

from __future__ import annotations

import math
from dataclasses import replace

from vlm_nemo.model.config import LanguageConfig, ModelConfig, MoeConfig, ProjectorConfig, VisionConfig

VOCABULARY = 384
VISUAL_WORDS = 48
LAYERS = 4
"""Of the decoder, so that two pipeline stages of two virtual chunks each fit."""
VISION_LAYERS = 3
HEAD = 8
"""Width of a head: two halves of two frequencies each, for rotary positions in two directions."""


def twin(cfg: ModelConfig) -> ModelConfig:
    """The same structure, shrunk: 4 layers of width 32 in the decoder, 3 of width 16 or 32 in the tower, 384 tokens.

    Sizes that a layout counts in (tiles, resolutions, pixels) shrink with the patch.
    """
    vision = _vision(cfg)
    scale = vision.image_size / cfg.vision.image_size
    layout = replace(
        cfg.layout,
        pinpoints=[[round(h * scale), round(w * scale)] for h, w in cfg.layout.pinpoints],
        longest_edge=None if cfg.layout.longest_edge is None else round(cfg.layout.longest_edge * scale),
    )
    if layout.kind == "native":
        side = vision.patch_size * _factor(cfg)
        layout = replace(layout, min_pixels=(2 * side) ** 2, max_pixels=(8 * side) ** 2)
    if layout.kind in ("tiles", "canvas", "ovis"):
        layout = replace(layout, max_tiles=min(layout.max_tiles, 4))
    language = _language(cfg.language)
    projector = _projector(cfg.projector, vision.hidden_size, cfg)
    return replace(
        cfg,
        layout=layout,
        vision=vision,
        reduce=replace(cfg.reduce),
        projector=projector,
        language=language,
        init_std=0.1,
        kernels="plain",
        fp8="none",
        megatron=dict(cfg.megatron),
    )


def _factor(cfg: ModelConfig) -> int:
    return 1 if cfg.reduce.kind == "none" else cfg.reduce.factor


def _vision(cfg: ModelConfig) -> VisionConfig:
    """Squares of 2 x 2 embeddings, or of 3 x 3 patches where an odd grid is to be filled up."""
    v, patch = cfg.vision, 4
    side = 2 * _factor(cfg)
    layers = VISION_LAYERS
    return replace(
        v,
        image_size=side * patch,
        patch_size=patch,
        hidden_size=4 * HEAD,
        num_layers=layers,
        num_heads=4,
        ffn_hidden_size=8 * HEAD,
        window=None if v.window is None else 2 * patch * _factor(cfg),
        full_attention_layers=[1] if v.full_attention_layers else [],
        tiles=None if v.tiles is None else min(v.tiles, 4),
        global_layers=min(v.global_layers, 2),
        kept_layers=[0, 2] if v.kept_layers else [],
        feature_layer=v.feature_layer if v.feature_layer in (-1, -2) else -1,
        position_init_std=None,
        mean=list(v.mean),
        std=list(v.std),
    )


def _language(c: LanguageConfig) -> LanguageConfig:
    width, heads = 32, 4
    head = c.head_dim
    if head is not None and head != c.hidden_size // c.num_heads:
        head = 2 * HEAD if head > c.hidden_size // c.num_heads else HEAD // 2
    else:
        head = None
    wide = head or width // heads
    sections = [wide // 4, wide // 8, wide // 2 - wide // 4 - wide // 8] if c.mrope_section else []
    scale = c.attention_scale
    return replace(
        c,
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=LAYERS,
        num_heads=heads,
        num_kv_heads=heads if c.num_kv_heads == c.num_heads else 2,
        head_dim=head,
        ffn_hidden_size=48,
        window=None if c.window is None else 8,
        global_every=None if c.global_every is None else 2,
        attention_scale=None if scale is None else 1 / math.sqrt(12),
        rope_scaling=replace(c.rope_scaling, original_positions=min(c.rope_scaling.original_positions, 64)),
        mrope_section=sections,
        embedding_scale=1.0 if c.embedding_scale == 1.0 else math.sqrt(width),
        cross_attention_layers=[1, 3] if c.cross_attention_layers else [],
        moe=_moe(c.moe),
        max_positions=512,
    )


def _moe(m: MoeConfig) -> MoeConfig:
    """Four experts, of which a token meets two (or one), so that two and four ranks can share them."""
    return replace(
        m,
        experts=None if m.experts is None else 4,
        top_k=min(m.top_k, 2),
        ffn_hidden_size=None if m.ffn_hidden_size is None else 24,
        shared_ffn_hidden_size=None if m.shared_ffn_hidden_size is None else 32,
        every=min(m.every, 2),
        dense_layers=[0] if m.dense_layers else [],
    )


def _projector(p: ProjectorConfig, vision_width: int, cfg: ModelConfig) -> ProjectorConfig:
    if p.kind in ("qformer", "perceiver"):
        return replace(
            p,
            num_queries=4,
            num_layers=min(p.num_layers, 3),
            hidden_size=None if p.hidden_size is None else 16,
            num_heads=4,
            num_kv_heads=None if p.num_kv_heads is None else 2,
            head_dim=None if p.head_dim is None else HEAD,
            ffn_hidden_size=None if p.ffn_hidden_size is None else 24,
        )
    hidden = p.hidden_size
    if hidden is not None:
        # as wide as what a merge makes, where it is so (Qwen2-VL)
        merged = cfg.vision.hidden_size * _factor(cfg) ** 2
        hidden = vision_width * _factor(cfg) ** 2 if hidden == merged else 40
    words = VISUAL_WORDS if p.kind == "visual_vocabulary" else p.vocabulary
    return replace(p, hidden_size=hidden, vocabulary=words)
