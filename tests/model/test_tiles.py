"""Tiles of an image that see one another: their numbers, recomputed layers, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from tests import compositions
from vlm_nemo.check.trial import open_gates
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.tiles import tile_rows, tilings
from vlm_nemo.model.views import blank_batch, vision_batch
from vlm_nemo.model.vision import check
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

CHOSEN = compositions.Composition(
    layout="canvas", tower="llama32", reduction="none", projector="cross_attention", language="llama"
)


def model() -> ModelConfig:
    return CHOSEN.config()


@pytest.mark.parametrize("most", [1, 3, 4, 6])
def test_arrangements_are_numbered_as_transformers_does(most: int) -> None:
    assert tilings(most) == get_all_supported_aspect_ratios(most)


def test_where_tiles_lie() -> None:
    rows = tile_rows(torch.tensor([[2, 1], [1, 1]]), tiles=3, places=5)
    assert rows.used.tolist() == [0, 1, 3] and rows.own == (2, 1)
    assert rows.arrangement.tolist() == [4, 1]  # 1x1 1x2 1x3 2x1
    assert rows.filling == 3 and rows.rows == 24
    with pytest.raises(ValueError, match="2 x 2 tiles; the tower takes 3"):
        tile_rows(torch.tensor([[2, 2]]), tiles=3, places=5)


def test_views_that_are_no_tiles_are_refused() -> None:
    vision = model().vision
    with pytest.raises(ValueError, match="1 views .* images are of 2"):
        vision_batch(torch.zeros(16, 192, dtype=torch.uint8), [(4, 4)], vision, torch.tensor([[1, 2]]))


def test_recomputed_layers_give_the_same_gradients() -> None:
    cfg = model()
    pixels = torch.randint(0, 256, (32, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        (chunk,) = build_model(cfg, ParallelConfig(), "fp32", seed=0)
        tower = chunk.vision
        for again in (None, "full"):
            tower.zero_grad()
            tower.blocks.config.recompute_granularity = again
            out = tower(vision_batch(pixels, [(4, 4)] * 2, cfg.vision, torch.tensor([[2, 1]])))
            assert out.shape == (3 * 17, 3 * 16)
            out.square().sum().backward()
            found.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
        small = tower(blank_batch(cfg.vision, 1))
        assert small.shape == (3 * 2, 3 * 16)
        groups.stop()
    largest = max(float(one.abs().max()) for one in found[0])
    # Sums over a feature's two uses, in another order
    assert all((one - other).abs().max() < 1e-6 * largest for one, other in zip(*found, strict=True))
    assert sum(bool(one.any()) for one in found[0]) > 30


def test_no_weight_is_idle_without_global_layers() -> None:
    """transformers adds the second vectors whether layers follow or not. One that gets no gradient breaks a run with
    parallel.overlap_grad_reduce off, at its second step."""
    cfg = model()
    cfg.vision = replace(cfg.vision, global_layers=0)
    pixels = torch.randint(0, 256, (32, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        chunks = build_model(cfg, ParallelConfig(), "fp32", seed=0)
        open_gates(chunks)
        tower = chunks[0].vision
        tower(vision_batch(pixels, [(4, 4)] * 2, cfg.vision, torch.tensor([[2, 1]]))).square().sum().backward()
        idle = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
        groups.stop()
    assert idle == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"class_token": False}, "model.vision.class_token=true"),
        ({"position": "rope"}, "model.vision.position=learned"),
        ({"tiles": 0}, "model.vision.tiles=0"),
        ({"kept_layers": [3]}, "model.vision.kept_layers"),
        ({"tiles": None}, "model.vision.global_layers=1"),
    ],
)
def test_towers_that_cannot_be(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        check(replace(model().vision, **changes), ParallelConfig())


def test_layouts_that_do_not_go_with_a_model() -> None:
    cfg = model()
    cfg.layout = replace(cfg.layout, max_tiles=4)
    with pytest.raises(UserError, match="model.vision.tiles=3 .* max_tiles=4"):
        spec_of(cfg)
    plain = replace(CHOSEN, tower="siglip", projector="mlp")
    for layout, key in (("anyres", "model.projector.newline=true"), ("ovis", "model.projector.kind=visual_vocabulary")):
        with pytest.raises(UserError, match=key):
            spec_of(replace(plain, layout=layout).config())
