"""Every tower against transformers' class with the same random weights, alone and split over two tensor ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model import towers
from tests.model.pieces import Pieces, assert_pieces_make, gradients
from tests.model.towers import TWINS, Twin
from tests.ranks import run_ranks
from vlm_nemo.model.views import Grid, vision_batch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


def grids_of(twin: Twin) -> list[Grid]:
    """Three views of one size, or of several, even (as Qwen needs them) or odd."""
    if not twin.any_grid:
        return [(5, 5)] * 3
    return [(4, 6), (10, 6), (10, 6), (2, 2)] if twin.cfg.position == "rope" else [(5, 5), (3, 4), (3, 4), (1, 7)]


def features(name: str, parallel: ParallelConfig, grids: list[Grid]) -> tuple[np.ndarray, Pieces]:
    """What our tower makes of random views, and the gradients of this rank's pieces."""
    twin = TWINS[name]
    tower = VisionTower(twin.cfg, parallel, torch.float32)
    towers.load(tower, twin, towers.random_twin(name))
    out = tower(vision_batch(towers.random_patches(grids), grids, twin.cfg))
    torch.manual_seed(3)
    (out * torch.randn(out.shape)).sum().backward()
    return out.detach().numpy(), gradients(tower)


@pytest.mark.parametrize("name", TWINS)
def test_equals_transformers(name: str) -> None:
    twin, grids = TWINS[name], grids_of(TWINS[name])
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for chosen in (grids, grids[-1:], grids[:1]):
            ours, _ = features(name, ParallelConfig(), chosen)
            theirs = towers.random_twin(name)
            with torch.no_grad():
                views = towers.pictures(towers.random_patches(chosen), chosen, twin.cfg)
                expected = torch.cat([twin.run(theirs, view) for view in views]).numpy()
            assert ours.shape == expected.shape
            assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
        groups.stop()


def all_towers(tensor: int) -> dict[str, tuple[np.ndarray, Pieces]]:
    parallel = ParallelConfig(tensor=tensor)
    with device.adapter():
        groups.start(parallel, seed=0)
        found = {name: features(name, parallel, grids_of(twin)) for name, twin in TWINS.items()}
        groups.stop()
    return found


def test_two_tensor_ranks_equal_one() -> None:
    alone = all_towers(1)
    ranks = run_ranks(all_towers, 2, 2)
    for name, (expected, whole) in alone.items():
        for out, _ in (rank[name] for rank in ranks):
            assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max(), name
        assert_pieces_make([pieces for _, pieces in (rank[name] for rank in ranks)], whole)
