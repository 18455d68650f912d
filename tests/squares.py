"""Square images as the model takes them, cut without the project's own cutter. No torch: a server's tests use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.types import Images


def squares(
    pixels: NDArray[np.uint8] | None, tokens: Sequence[int] = (), image: int = 3, patch: int = 8
) -> Images[NDArray[Any]] | None:
    """[n, 3, S, S], every embedding at the next of the tokens that are `image`; None for None."""
    if pixels is None:
        return None
    side = pixels.shape[-1] // patch
    cut = [
        p[:, y : y + patch, x : x + patch].transpose(1, 2, 0).reshape(-1)
        for p in pixels
        for y in range(0, side * patch, patch)
        for x in range(0, side * patch, patch)
    ]
    slots = np.flatnonzero(np.asarray(tokens, dtype=np.int64) == image)
    return Images(
        patches=np.stack(cut) if cut else np.zeros((0, 3 * patch**2), np.uint8),
        grids=np.full((len(pixels), 2), side, dtype=np.int64),
        views=np.ones(len(pixels), dtype=np.int64),
        embeddings=np.full(len(pixels), len(slots) // max(1, len(pixels)), dtype=np.int64),
        slots=slots,
        sources=np.arange(len(slots), dtype=np.int64),
    )
