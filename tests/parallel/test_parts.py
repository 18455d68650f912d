"""Towers and projectors on two tensor ranks give what they give on one: features, and every piece of the gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.model import parts, pieces
from tests.model.pieces import Pieces
from vlm_nemo.model.projector.build import build_projector
from vlm_nemo.model.views import vision_batch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.processes import run_ranks

FLOAT = torch.float32


def outcome(module: nn.Module, *inputs: Tensor) -> tuple[np.ndarray, Pieces]:
    """Of a module filled with random numbers; inputs: what else its result depends on."""
    torch.manual_seed(3)
    out = module(*inputs)
    extra = module.extra_rows() if hasattr(module, "extra_rows") else None
    if extra is not None:
        out = torch.cat((out, extra))
    (out * torch.randn(out.shape)).sum().backward()
    return out.detach().numpy(), pieces.gradients(module)


def all_parts(tensor: int) -> dict[str, tuple[np.ndarray, Pieces]]:
    parallel, found = ParallelConfig(tensor=tensor), {}
    with device.adapter():
        groups.start(parallel, seed=0)
        for name, vision in parts.TOWERS.items():
            tower, grids = VisionTower(vision, parallel, FLOAT), parts.grids_of(vision)
            pieces.fill(tower)
            found[f"tower {name}"] = outcome(tower, vision_batch(parts.random_patches(grids), grids, vision))
        for name, cfg in parts.PROJECTORS.items():
            projector, grids = build_projector(cfg, parallel, FLOAT), [(4, 2), (2, 2), (2, 2)]
            pieces.fill(projector)
            features = parts.random_features(grids).requires_grad_()
            found[f"projector {name}"] = outcome(projector, features, grids)
            found[f"features of {name}"] = features.grad.numpy(), []
        groups.stop()
    return found


def test_two_tensor_ranks_equal_one() -> None:
    alone = all_parts(1)
    ranks = run_ranks(all_parts, 2, 2)
    for name, (expected, whole) in alone.items():
        for out, _ in (rank[name] for rank in ranks):
            assert out.shape == expected.shape
            assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max(), name
        if whole:
            pieces.assert_pieces_make([found for _, found in (rank[name] for rank in ranks)], whole)
