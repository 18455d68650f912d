"""Reductions on numbers that one can follow. Their order is held to transformers' in test_projectors.py."""

from __future__ import annotations

import pytest
import torch

from vlm_nemo.model.config import ReduceConfig
from vlm_nemo.model.reduce import reduce, reduced_grid


def test_blocks_row_by_row() -> None:
    features = torch.arange(8.0)[:, None]
    for kind in ("pixel_shuffle", "merge", "hidden_stride"):
        out, left = reduce(features, [(2, 4)], ReduceConfig(kind=kind, factor=2))
        assert out.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]] and left == [(1, 2)]


def test_views_of_several_sizes() -> None:
    """Two of 2 x 2, one of 4 x 2, each by itself."""
    features = torch.arange(16.0)[:, None]
    out, left = reduce(features, [(2, 2), (2, 2), (4, 2)], ReduceConfig(kind="average_pool", factor=2))
    assert out.flatten().tolist() == [1.5, 5.5, 9.5, 13.5] and left == [(1, 1), (1, 1), (2, 1)]


def test_odd_grids_are_padded_with_zeros() -> None:
    out, left = reduce(torch.arange(1.0, 4)[:, None], [(1, 3)], ReduceConfig(kind="hidden_stride", factor=2))
    assert out.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]] and left == [(1, 2)]


def test_three_by_three() -> None:
    out, _ = reduce(torch.arange(9.0)[:, None], [(3, 3)], ReduceConfig(kind="merge", factor=3))
    assert out.tolist() == [list(range(9))]


def test_refuses_an_odd_grid() -> None:
    with pytest.raises(ValueError, match="3 x 4 patches is not a multiple of model.reduce.factor=2"):
        reduced_grid((3, 4), ReduceConfig(kind="merge", factor=2))
