"""Tiny towers, reductions, projectors and decoders that go together freely, and rows of images for whatever they make.

A part is a dictionary of what differs from the defaults; the names are those of the families that they come from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.plan import ImagePlan, Placeholders
from vlm_nemo.data.positions import cumulative, grid_positions, packed_positions
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
SIZES = [(40, 30), (70, 30), (20, 61)]
"""Width and height of images, pixels."""
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
    "llama32": dict(
        activation="gelu",
        qkv_bias=False,
        output_bias=False,
        keep_class_token=True,
        post_norm=True,
        feature_layer=-1,
        tiles=3,
        global_layers=1,
        kept_layers=[0, 2],
    ),
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
    "cross_attention": dict(kind="cross_attention"),
}
LOOKING = [1, 3]
"""Layers that look at images, of the last one's decoder."""
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
NATURAL = {"qwen2_vit": "native", "qwen25_vit": "native", "llama32": "canvas"}
"""Tower -> the layout that its families have; square of all others."""
LAYOUTS: dict[str, Part] = {
    "square": {},
    "anyres": dict(pinpoints=[[32, 64], [64, 32], [64, 64]]),
    "tiles": dict(max_tiles=3),
    "canvas": dict(max_tiles=3),
    "ovis": dict(max_tiles=3),
    "rows": dict(longest_edge=64),
    "native": dict(min_pixels=256, max_pixels=2048),
}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One choice of each."""

    tower: str
    reduction: str
    projector: str
    language: str
    layout: str = "square"

    def __str__(self) -> str:
        return " + ".join((self.layout, self.tower, self.reduction, self.projector, self.language))

    def config(self) -> ModelConfig:
        """Views of 4 x 4 patches; four decoder layers, so that two stages have two each."""
        vision = dict(image_size=32, patch_size=8, hidden_size=16, num_layers=3, num_heads=4, ffn_hidden_size=24)
        language: Part = dict(
            vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=48
        )
        if self.projector == "cross_attention":
            language["cross_attention_layers"] = LOOKING
        return ModelConfig(
            family="",
            layout=LayoutConfig(kind=self.layout, **LAYOUTS[self.layout]),
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
        Composition(tower=t, reduction=r, projector=p, language=la, layout=NATURAL.get(t, "square"))
        for t, r, p, la in zip(deck(TOWERS), deck(REDUCTIONS), deck(PROJECTORS), deck(LANGUAGES), strict=True)
    ]
    return [replace(c, reduction="none") if TOWERS[c.tower].get("keep_class_token") else c for c in made]


def rows(
    cfg: ModelConfig, count: int, seed: int, capacity: int = 96, images: Sequence[Sequence[int]] = ((1, 2, 0), (0, 0))
) -> list[PackedBatch]:
    """Packed rows. images: of each sample of a row, the rows taking turns; the second one has none as it is."""
    return [_row(cfg, images[i % len(images)], seed + 10 * i, capacity) for i in range(count)]


def _row(cfg: ModelConfig, images: Sequence[int], seed: int, capacity: int) -> PackedBatch:
    """Samples of random words; images of random pixels, whose places are those that the layout plans."""
    g = torch.Generator().manual_seed(seed)
    spec, extra = spec_of(cfg), int(cfg.projector.newline and cfg.layout.kind != "anyres")
    tokens: list[int] = []
    texts: list[list[int]] = []
    plans: list[ImagePlan] = []
    slots: list[int] = []
    sources: list[int] = []
    own: list[Any] = []
    before = 0
    for number, wanted in enumerate(images):
        sample, spans = _words(3 + number, g), []
        for k in range(wanted):
            plan = plan_image(spec, SIZES[(number + k + seed) % len(SIZES)])
            if plan.cross:
                slots.append(len(tokens) + len(sample))
                sample.append(IMAGE)
            if plan.span is not None:
                spans.append((len(sample), *plan.span))
            for item in (*plan.items, *([Placeholders(sources=-1 - np.arange(extra))] if extra else [])):
                if isinstance(item, str):
                    sample += _words(2, g)
                    continue
                slots += range(len(tokens) + len(sample), len(tokens) + len(sample) + len(item.sources))
                assert item.shares is None, "no layout here scales down"
                sources += [int(x) + before * (x >= 0) for x in item.sources]
                sample += _words(1, g) if item.token else [IMAGE] * len(item.sources)
            sample += _words(2, g)
            plans.append(plan)
            before += plan.embeddings
        sample += _words(5, g)
        tokens += sample
        texts.append(sample)
        own.append(grid_positions(len(sample), spans) if spans else None)
    lengths, tail = [len(text) for text in texts], capacity - len(tokens)
    assert tail > 0, (lengths, capacity)
    ids = torch.tensor([*tokens, *[PAD] * tail])
    labels = ids.roll(-1)
    labels[np.cumsum(lengths) - 1] = IGNORE_INDEX
    labels[len(tokens) :] = IGNORE_INDEX
    labels[labels == IMAGE] = IGNORE_INDEX
    grids = [grid for plan in plans for grid in plan.grids]
    patches = (sum(plan.cost for plan in plans), 3 * cfg.vision.patch_size**2)
    return PackedBatch(
        tokens=ids,
        labels=labels,
        positions=torch.from_numpy(packed_positions([*lengths, tail], own)),
        cu_seqlens=torch.from_numpy(cumulative([*lengths, tail])),
        images=Images(
            patches=torch.randint(0, 256, patches, generator=g, dtype=torch.uint8),
            grids=torch.tensor(grids, dtype=torch.int64).view(-1, 2),
            views=torch.tensor([len(plan.grids) for plan in plans], dtype=torch.int64),
            embeddings=torch.tensor([plan.embeddings for plan in plans], dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            sources=torch.tensor(sources, dtype=torch.int64),
            tilings=None if spec.tiles is None else torch.tensor([plan.tiling for plan in plans]).view(-1, 2),
        ),
        samples=len(images),
        used_tokens=len(tokens),
    )


def _words(count: int, g: torch.Generator) -> list[int]:
    return torch.randint(4, 60, (count,), generator=g).tolist()
