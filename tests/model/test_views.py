"""Laying out views: windows, class tokens, stretched positions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.model import parts
from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.reduce import reduced_grid
from vlm_nemo.model.views import bicubic, blank_view, grid_places, patchify, vision_batch, window_order
from vlm_nemo.model.vision import VisionTower, check
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


def test_places() -> None:
    assert grid_places((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid_places((1, 1)).tolist() == [[0, 0]]


def test_windows_stand_together() -> None:
    order, lengths = window_order((2, 3), 2)
    assert order.tolist() == [0, 1, 4, 2, 3, 5] and lengths == [4, 2]
    order, lengths = window_order((3, 3), 2)
    assert sorted(order.tolist()) == list(range(9)) and lengths == [4, 2, 2, 1]


@pytest.mark.parametrize(("old", "new"), [(5, 3), (5, 9), (4, 4), (7, 1), (2, 5)])
def test_stretching_is_torchs(old: int, new: int) -> None:
    row = torch.randn(1, 1, old, old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(row, size=(new, old), mode="bicubic", align_corners=False)[0, 0]
    assert (bicubic(old, new).double() @ row[0, 0] - expected).abs().max() < 1e-6
    if old == new:
        assert torch.equal(bicubic(old, new), torch.eye(old))


def test_class_tokens_come_first() -> None:
    patches = parts.random_patches([(1, 2), (1, 1)])
    kept = vision_batch(patches, [(1, 2), (1, 1)], parts.vision(keep_class_token=True))
    assert kept.class_rows is not None and kept.class_rows.tolist() == [0, 3]
    assert kept.patch_rows is not None and kept.patch_rows.tolist() == [1, 2, 4]
    assert kept.out_rows is None
    dropped = vision_batch(patches, torch.tensor([[1, 2], [1, 1]]), parts.vision())
    assert dropped.out_rows is not None and dropped.out_rows.tolist() == [1, 2, 4]


def test_patches_and_grids_must_agree() -> None:
    with pytest.raises(ValueError, match=r"3 patches, but grids \[\(1, 2\)\] are of 2"):
        vision_batch(parts.random_patches([(1, 3)]), [(1, 2)], parts.vision())


def test_patchify() -> None:
    """Row by row of patches; inside one row by row, the colours of a pixel side by side."""
    image = torch.arange(2 * 2 * 4 * 3).view(1, 2 * 2, 4, 3)  # [1, H, W, colours], numbered in that order
    patches = patchify(image.permute(0, 3, 1, 2), 2)
    assert patches.shape == (4, 12)
    assert patches[1].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("name", parts.TOWERS)
def test_views_do_not_see_one_another(name: str) -> None:
    """A view alone gives what it gives among others, and a blank one can stand where there is none."""
    cfg = parts.TOWERS[name]
    grids = parts.grids_of(cfg)
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        tower = VisionTower(cfg, ParallelConfig(), torch.float32)
        for parameter in tower.parameters():
            parameter.normal_(0, 0.2)
        patches = parts.random_patches(grids)
        together = tower(vision_batch(patches, grids, cfg))
        sizes = [h * w for h, w in grids]
        extra = int(cfg.class_token and cfg.keep_class_token)
        alone = [tower(vision_batch(x, [g], cfg)) for x, g in zip(patches.split(sizes), grids, strict=True)]
        for ours, view in zip(together.split([n + extra for n in sizes]), alone, strict=True):
            assert (ours - view).abs().max() < 1e-5 * view.abs().max()
        blank = tower(vision_batch(*blank_view(cfg, 2), cfg))
        assert blank.shape == (4 + extra, 32) and blank.isfinite().all()
        groups.stop()


def test_the_blank_view_divides() -> None:
    for cfg in parts.PROJECTORS.values():
        _, grids = blank_view(cfg.vision, cfg.reduce.factor)
        rows, columns = grids[0].tolist()
        assert reduced_grid((rows, columns), cfg.reduce) != (0, 0)


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (parts.vision(class_token=False, window=6), "model.vision.window=6"),
        (parts.vision(window=8), "model.vision.class_token"),
        (parts.vision(post_norm=True), "model.vision.post_norm"),
        (parts.vision(num_heads=3), "model.vision.num_heads=3"),
        (parts.vision(hidden_size=24, position="rope", class_token=False), "model.vision.position=rope"),
        (parts.vision(feature_layer=-4), "model.vision.feature_layer is -4"),
    ],
)
def test_refuses(cfg: VisionConfig, key: str) -> None:
    with pytest.raises(UserError, match=key):
        check(cfg, ParallelConfig())


def test_refuses_heads_that_ranks_cannot_share() -> None:
    with pytest.raises(UserError, match="model.vision.num_heads=4 is not a multiple of parallel.tensor=3"):
        check(parts.vision(), ParallelConfig(tensor=3))
