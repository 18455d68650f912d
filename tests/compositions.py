"""Tiny towers, reductions, projectors and decoders that go together freely, and rows of images for whatever they make.

A part is a dictionary of what differs from the defaults; the names are those of the families that they come from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    ReduceConfig,
    RopeScaling,
    VisionConfig,
)
from vlm_nemo.model.layout import spec_of
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch

IMAGE, PAD = 3, 0
EXTRA = {"newline": 1}
"""Extra rows of a projector that has a newline; a visual vocabulary has as many as indicators."""
Part = dict[str, Any]

RMS = dict(norm="rmsnorm", activation="silu", gated=True, pre_norm=False, class_token=False, feature_layer=-1)
TOWERS: dict[str, Part] = {
    "clip": {},
    "clip_class_token": dict(keep_class_token=True),
    "siglip": dict(
        class_token=False, patch_bias=True, activation="gelu_tanh", pre_norm=False, post_norm=True, feature_layer=-1
    ),
    "intern_vit": dict(patch_bias=True, activation="gelu", pre_norm=False, layer_scale=0.1, feature_layer=-1),
    "intern_vit_6b": dict(
        norm="rmsnorm",
        qkv_bias=False,
        qk_norm=True,
        pre_norm=False,
        layer_scale=0.1,
        feature_layer=-1,
        activation="gelu",
    ),
    "qwen2_vit": dict(position="rope", temporal_patch_size=2, class_token=False, pre_norm=False, feature_layer=-1),
    "qwen25_vit": dict(position="rope", temporal_patch_size=2, window=16, full_attention_layers=[2], **RMS),
    "aimv2": dict(patch_bias=True, patch_norm=True, post_norm=True, qkv_bias=False, bias=False, **RMS),
    "plain": dict(class_token=False, pre_norm=False, position="none"),
}
REDUCTIONS: dict[str, Part] = {
    "none": dict(kind="none"),
    "pixel_shuffle": dict(kind="pixel_shuffle"),
    "merge": dict(kind="merge"),
    "hidden_stride": dict(kind="hidden_stride"),
    "average_pool": dict(kind="average_pool"),
}
PROJECTORS: dict[str, Part] = {
    "linear": dict(num_layers=1),
    "mlp": dict(num_layers=2),
    "mlp_of_three": dict(num_layers=3, hidden_size=24),
    "mlp_newline": dict(newline=True),
    "norm_mlp": dict(norm="layernorm"),
    "patch_norm_mlp": dict(norm="rmsnorm", norm_place="patch"),
    "gemma": dict(num_layers=1, bias=False, norm="gemma"),
    "qformer": dict(kind="qformer", num_layers=2, num_queries=3, num_heads=4, hidden_size=16),
    "perceiver": dict(kind="perceiver", num_layers=2, num_queries=3, num_heads=4, num_kv_heads=2, hidden_size=16),
    "visual_vocabulary": dict(kind="visual_vocabulary", vocabulary=48),
    "visual_vocabulary_argmax": dict(kind="visual_vocabulary", vocabulary=48, tokenize="st_argmax"),
}
LANGUAGES: dict[str, Part] = {
    "llama": {},
    "llama3": dict(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_positions=16)),
    "mistral": dict(window=6, head_dim=12),
    "qwen2": dict(qkv_bias=True, tied_embeddings=True),
    "qwen2_vl": dict(qkv_bias=True, mrope_section=[2, 1, 1]),
    "qwen3": dict(qk_norm=True, head_dim=16),
    "gemma3": dict(
        activation="gelu_tanh",
        qk_norm=True,
        norm_plus_one=True,
        sandwich_norm=True,
        window=8,
        global_every=2,
        attention_scale=0.3,
        image_attention="bidirectional",
        rope_base=100000.0,
        rope_local_base=10000.0,
        embedding_scale=5.6,
        tied_embeddings=True,
    ),
    "smollm2": dict(tied_embeddings=True, rope_base=100000.0),
}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One choice of each."""

    tower: str
    reduction: str
    projector: str
    language: str

    def __str__(self) -> str:
        return " + ".join((self.tower, self.reduction, self.projector, self.language))

    def config(self) -> ModelConfig:
        """Views of 4 x 4 patches; four decoder layers, so that two stages have two each."""
        vision = dict(image_size=32, patch_size=8, hidden_size=16, num_layers=3, num_heads=4, ffn_hidden_size=24)
        language = dict(vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=48)
        return ModelConfig(
            family="",
            vision=VisionConfig(**(vision | TOWERS[self.tower])),
            reduce=ReduceConfig(**REDUCTIONS[self.reduction]),
            projector=ProjectorConfig(**PROJECTORS[self.projector]),
            language=LanguageConfig(**(language | LANGUAGES[self.language])),
            init_std=0.1,
        )


def draw(count: int, seed: int) -> list[Composition]:
    """Different ones, every part at least once if count allows. A class token has no neighbours to be reduced with."""
    rng = random.Random(seed)

    def deck(names: dict[str, Part]) -> list[str]:
        cards: list[str] = []
        while len(cards) < count:
            cards += rng.sample(list(names), len(names))
        return cards[:count]

    made = [
        Composition(tower=t, reduction=r, projector=p, language=la)
        for t, r, p, la in zip(deck(TOWERS), deck(REDUCTIONS), deck(PROJECTORS), deck(LANGUAGES), strict=True)
    ]
    return [replace(c, reduction="none") if c.tower == "clip_class_token" else c for c in made]


def rows(cfg: ModelConfig, count: int, seed: int, capacity: int = 96) -> list[PackedBatch]:
    """Packed rows of three samples with none, one and two images; every fourth row has no image at all."""
    return [_row(cfg, [0, 0] if i % 4 == 1 else [1, 2, 0], seed + 10 * i, capacity) for i in range(count)]


def _row(cfg: ModelConfig, images: list[int], seed: int, capacity: int) -> PackedBatch:
    g = torch.Generator().manual_seed(seed)
    spec, extra = spec_of(cfg), _extra_rows(cfg)
    # Learned positions stretch to other grids, rotary ones need not; a window may be cut at the border
    grids = [(4, 4), (2, 4), (6, 2)]
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sources: list[int] = []
    patches, shapes, cu, embeddings = [], [], [0], 0
    for number, wanted in enumerate(images):
        sample = _words(3 + number, g)
        for k in range(wanted):
            grid = grids[(number + k) % 3] if spec.queries is None or k else grids[0]
            given = view_tokens(spec, grid)
            stands = [*range(embeddings, embeddings + given), *(-1 - x for x in range(extra))]
            slots += range(len(tokens) + len(sample), len(tokens) + len(sample) + len(stands))
            sources += stands
            sample += [IMAGE] * len(stands) + _words(2, g)
            patches.append(torch.randint(0, 256, (grid[0] * grid[1], 192), generator=g, dtype=torch.uint8))
            shapes.append(grid)
            embeddings += given
        sample += _words(5, g)
        tokens += sample
        positions += range(len(sample))
        cu.append(len(tokens))
    used, tail = len(tokens), capacity - len(tokens)
    assert tail >= 0, (used, capacity)
    ids = torch.tensor([*tokens, *[PAD] * tail])
    labels = torch.full((capacity,), IGNORE_INDEX)
    labels[: used - 1] = ids[1:used]
    labels[[end - 1 for end in cu[1:]]] = IGNORE_INDEX
    labels[labels == IMAGE] = IGNORE_INDEX
    where = torch.tensor([*positions, *range(tail)]).repeat(3, 1)
    if cfg.language.mrope_section:  # any three rows will do: what a layout makes of them is its own test
        where[1:, : used // 2] += torch.randint(0, 4, (2, used // 2), generator=g)
    none = torch.empty(0, 192, dtype=torch.uint8)
    return PackedBatch(
        tokens=ids,
        labels=labels,
        positions=where,
        cu_seqlens=torch.tensor([*cu, capacity] if tail else cu, dtype=torch.int32),
        images=Images(
            patches=torch.cat([none, *patches]),
            grids=torch.tensor(shapes, dtype=torch.int64).view(-1, 2),
            views=torch.ones(len(shapes), dtype=torch.int64),
            embeddings=torch.tensor([view_tokens(spec, grid) for grid in shapes], dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            sources=torch.tensor(sources, dtype=torch.int64),
        ),
        samples=len(images),
        used_tokens=used,
    )


def _words(count: int, g: torch.Generator) -> list[int]:
    return torch.randint(4, 60, (count,), generator=g).tolist()


def _extra_rows(cfg: ModelConfig) -> int:
    return cfg.projector.indicators if cfg.projector.kind == "visual_vocabulary" else int(cfg.projector.newline)
