"""Every tower against transformers' class with the same random weights: equal views and views of several sizes."""

from __future__ import annotations

import pytest
import torch

from tests.model import parts, towers
from tests.model.towers import TWINS
from vlm_nemo.model.views import Grid, vision_batch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


@pytest.mark.parametrize("name", TWINS)
def test_equals_transformers(name: str) -> None:
    twin, cfg = TWINS[name], parts.TOWERS[name]
    grids: list[Grid] = parts.grids_of(cfg) if twin.any_grid else [(5, 5)] * 3
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        tower = VisionTower(cfg, ParallelConfig(), torch.float32)
        towers.load(tower, name)
        for chosen in (grids, grids[-1:], grids[1:3]):
            patches = parts.random_patches(chosen)
            ours = tower(vision_batch(patches, chosen, cfg))
            pictures = towers.pictures(patches, chosen, cfg)
            expected = torch.cat([twin.run(towers.random_twin(name), picture) for picture in pictures])
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
        groups.stop()
