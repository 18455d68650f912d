"""Every tower against transformers' class with the same random weights, alone and split over two tensor ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model import towers
from tests.model.towers import TWINS, Twin
from tests.ranks import run_ranks
from vlm_nemo.model.build import mark_split
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.views import Grid, vision_batch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


def grids_of(twin: Twin) -> list[Grid]:
    """Three views of one size, or of several, even (as Qwen needs them) or odd."""
    if not twin.any_grid:
        return [(5, 5)] * 3
    return [(4, 6), (10, 6), (10, 6), (2, 2)] if twin.cfg.position == "rope" else [(5, 5), (3, 4), (3, 4), (1, 7)]


def features(name: str, parallel: ParallelConfig, grids: list[Grid]) -> tuple[Tensor, dict[str, Tensor]]:
    """What our tower makes of them, and the gradients (this rank's pieces put together by name and place)."""
    twin = TWINS[name]
    tower = VisionTower(twin.cfg, parallel, torch.float32)
    towers.load(tower, twin, towers.random_twin(twin))
    out = tower(vision_batch(towers.random_patches(grids), grids, twin.cfg))
    torch.manual_seed(3)
    (out * torch.randn(out.shape)).sum().backward()
    gradients = {}
    for local in local_parameters([tower]):
        assert local.parameter.grad is not None, local.name
        for box, piece in local.pieces(local.parameter.grad):
            gradients[f"{box.key} {box.offset} {box.global_shape}"] = piece.clone()
    return out.detach(), gradients


@pytest.mark.parametrize("name", TWINS)
def test_equals_transformers(name: str) -> None:
    twin, grids = TWINS[name], grids_of(TWINS[name])
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for chosen in (grids, grids[-1:], grids[:1]):
            ours, _ = features(name, ParallelConfig(), chosen)
            theirs = towers.random_twin(twin)
            with torch.no_grad():
                views = towers.pictures(towers.random_patches(chosen), chosen, twin.cfg)
                expected = torch.cat([twin.run(theirs, view) for view in views])
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()
        groups.stop()


def all_towers(tensor: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    parallel = ParallelConfig(tensor=tensor)
    with device.adapter():
        groups.start(parallel, seed=0)
        found = {name: features(name, parallel, grids_of(twin)) for name, twin in TWINS.items()}
        groups.stop()
    return found


def test_two_tensor_ranks_equal_one() -> None:
    alone = all_towers(1)
    ranks = run_ranks(all_towers, 2, 2)
    for name, (expected, gradients) in alone.items():
        split = 0
        for out, mine in (rank[name] for rank in ranks):
            assert (out - expected).abs().max() < 1e-5 * expected.abs().max(), name
            for box, piece in mine.items():
                key, place = box.split(" ", 1)
                whole = next(g for b, g in gradients.items() if b.split(" ")[0] == key and b.split(" ")[1] == place.split(" ")[0])
                split += piece.shape != whole.shape
        assert split > 0
