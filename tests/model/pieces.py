"""Parts of a model alone: filled with random numbers or transformers' weights, and put together from tensor ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vlm_nemo.model.boxes import Box, local_parameters
from vlm_nemo.weights.names.rows import Entry

Pieces = list[tuple[Box, np.ndarray]]
"""Arrays, because tensors do not travel between processes that end."""


def fill(module: nn.Module) -> None:
    """Random numbers by name, the same whole tensors however they are split. None at zero or one, which would hide
    mistakes."""
    with torch.no_grad():
        for local in local_parameters([module]):
            for box, piece in local.pieces(local.parameter.data):
                seed = int.from_bytes(hashlib.sha256(box.key.encode()).digest()[:7], "little")
                whole = torch.randn(box.global_shape, generator=torch.Generator().manual_seed(seed)) * 0.2
                norm = box.key.endswith("weight") and "norm" in box.key
                piece.copy_(whole[box.slices] + (1 if norm else 0))


def load(module: nn.Module, part: str, state: Mapping[str, Tensor], entries: Iterable[Entry]) -> None:
    """transformers' tensors by a table of names; every parameter must be in it, and nothing else."""
    table = {entry.ours: entry for entry in entries}
    parameters = local_parameters([module])
    assert {f"{part}.{p.boxes[0].key}" for p in parameters} == set(table)
    with torch.no_grad():
        for local in parameters:
            for box, piece in local.pieces(local.parameter.data):
                entry = table[f"{part}.{box.key}"]
                whole = entry.transform.join([state[name] for name in entry.theirs], entry.sizes)
                assert whole.shape == box.global_shape, box.key
                piece.copy_(whole[box.slices])


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
