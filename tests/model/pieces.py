"""Gradients of a part on several tensor ranks against those of one process, box by box."""

from __future__ import annotations

import numpy as np
from torch import nn

from vlm_nemo.model.boxes import Box, local_parameters

Pieces = list[tuple[Box, np.ndarray]]
"""Arrays, because tensors do not travel between processes that end."""


def gradients(module: nn.Module) -> Pieces:
    """Every box of this process's parameters, with its gradient."""
    found = []
    for local in local_parameters([module]):
        assert local.parameter.grad is not None, f"{local.name} has no gradient"
        found += [(box, piece.numpy().copy()) for box, piece in local.pieces(local.parameter.grad)]
    return found


def assert_pieces_make(ranks: list[Pieces], alone: Pieces) -> None:
    """Every rank's pieces equal their places in the whole, and together they fill it."""
    whole: dict[str, np.ndarray] = {}
    for box, piece in alone:
        whole.setdefault(box.key, np.zeros(box.global_shape))[box.slices] = piece
    filled = {key: np.zeros(tensor.shape, dtype=bool) for key, tensor in whole.items()}
    for pieces in ranks:
        for box, piece in pieces:
            expected = whole[box.key][box.slices]
            assert np.abs(piece - expected).max() < 1e-5 * np.abs(whole[box.key]).max() + 1e-6, box.key
            filled[box.key][box.slices] = True
    assert all(places.all() for places in filled.values())
    if len(ranks) > 1:
        assert any(box.shape != box.global_shape for box, _ in ranks[0]), "nothing is split"
