"""LLaVA-NeXT's any resolution: the whole image as one square, then tiles of the best of some resolutions.

    image 500 x 300, pinpoints 336 x 672, …       +---whole---+   +--tile 1--+--tile 2--+
                                                  |  squashed  |   |          |          |   fitted, padded black
                                                  +------------+   +----------+----------+

The tiles' embeddings are read line by line across all tiles; lines and columns that hold nothing but padding are left
out, and each line ends with the learned newline:

    sources  [whole: 0 … 575] [line 1: 576 … 599, 1152 … 1175, newline] [line 2: …] …

LLaVA-OneVision scales the lines down where they are more than max_unpadded tiles: each embedding that is left is a
bilinear mean of four.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, Ints, Placeholders, Shares, run
from vlm_nemo.data.layout.spec import ImageSpec, reduced, view_tokens
from vlm_nemo.data.layout.square import square_canvas
from vlm_nemo.types import UserError

NEWLINE = -1
"""Extra row 0."""


def plan_anyres(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """size: (width, height). Raises UserError for sizes that do not go together."""
    _check(spec)
    width, height = size
    side, square = spec.size, (spec.size, spec.size)
    best = best_pinpoint(spec.layout.pinpoints, width, height)
    fitted = fit(width, height, best)
    corner = (best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2
    whole = Canvas(steps=(square,), size=square, view=square)
    tiles = Canvas(steps=(fitted,), size=best, view=square, corner=corner)
    tokens = view_tokens(spec, spec.grid)
    rows, columns = best[0] // side, best[1] // side
    lines = _lines(spec, rows, columns, width, height)
    limit = spec.layout.max_unpadded
    down, _ = reduced(spec, spec.grid)
    ratio = 0.0 if limit is None else math.sqrt(lines.size / (limit * down * down))
    sources, shares = (lines, None) if ratio <= 1.1 else scaled_down(lines, ratio)
    return ImagePlan(
        canvases=(whole, tiles),
        grids=(spec.grid,) * (1 + rows * columns),
        embeddings=tokens * (1 + rows * columns),
        items=(run(0, tokens), _with_newlines(sources, shares)),
    )


def plan_without_tiles(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """One square view, padded with the mean colour, and a newline behind it. size: (width, height)."""
    padded = replace(spec, layout=replace(spec.layout, aspect="pad"))
    tokens = view_tokens(spec, spec.grid)
    sources = np.append(np.arange(tokens), NEWLINE)
    return ImagePlan(
        canvases=(square_canvas(padded, *size),),
        grids=(spec.grid,),
        embeddings=tokens,
        items=(Placeholders(sources=sources),),
    )


def best_pinpoint(pinpoints: list[list[int]], width: int, height: int) -> tuple[int, int]:
    """(height, width) of the resolution that shows most of the image's pixels, and of those the one with least waste.

    ([[336, 672], [672, 672]], 500, 300) -> (672, 672)
    """
    best, shown, wasted = (0, 0), 0, math.inf
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = rows * columns - effective
        if effective > shown or (effective == shown and waste < wasted):
            best, shown, wasted = (rows, columns), effective, waste
    return best


def fit(width: int, height: int, best: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image inside `best` with its own shape: one side fills it."""
    across, down = best[1] / width, best[0] / height
    if across < down:
        return min(math.ceil(height * across), best[0]), best[1]
    return best[0], min(math.ceil(width * down), best[1])


def unpadded(rows: int, columns: int, width: int, height: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what an image of that shape covers on rows x columns embeddings.

    (48, 48, 500, 300) -> (10, 38, 0, 48): floor(48 * 300 / 500) = 28 lines, ten left out above and below
    """
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        pad = (rows - kept) // 2
        return pad, rows - pad, 0, columns
    kept = int(round(width * (rows / height), 7))
    pad = (columns - kept) // 2
    return 0, rows, pad, columns - pad


def _lines(spec: ImageSpec, rows: int, columns: int, width: int, height: int) -> Ints:
    """[lines, embeddings of a line]: sources, counted from the whole's first."""
    down, across = reduced(spec, spec.grid)
    first = np.arange((1 + rows * columns) * down * across).reshape(1 + rows * columns, down, across)
    board = first[1:].reshape(rows, columns, down, across).transpose(0, 2, 1, 3).reshape(rows * down, columns * across)
    top, bottom, left, right = unpadded(rows * down, columns * across, width, height)
    return board[top:bottom, left:right]


def scaled_down(lines: Ints, ratio: float) -> tuple[Ints, Shares]:
    """[rows, columns] -> [rows / ratio, columns / ratio, 4] sources and shares, as PyTorch interpolates (bilinear, not
    antialiased, corners not aligned)."""
    (top, bottom, down), (left, right, across) = (_between(side, int(side // ratio)) for side in lines.shape)
    corners = [lines[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    weights = [np.multiply.outer(v, h) for v in (1 - down, down) for h in (1 - across, across)]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1).astype(np.float32)


def _between(side: int, to: int) -> tuple[Ints, Ints, Shares]:
    """For each of `to` places: its neighbours before and behind among `side`, and the share of the latter."""
    at = np.maximum((np.arange(to, dtype=np.float32) + np.float32(0.5)) * np.float32(side / to) - np.float32(0.5), 0)
    before = at.astype(np.int64)
    return before, np.minimum(before + 1, side - 1), (at - before).astype(np.float32)


def _with_newlines(lines: Ints, shares: Shares | None) -> Placeholders:
    """Line by line, a newline behind each."""
    newline = np.full((len(lines), 1, *lines.shape[2:]), NEWLINE, dtype=np.int64)
    sources = np.concatenate([lines, newline], axis=1).reshape(-1, *lines.shape[2:])
    if shares is not None:
        whole = np.tile(np.array([1, 0, 0, 0], dtype=np.float32), (len(lines), 1, 1))
        shares = np.concatenate([shares, whole], axis=1).reshape(-1, 4)
    return Placeholders(sources=sources, shares=shares)


def _check(spec: ImageSpec) -> None:
    if not spec.layout.pinpoints:
        raise UserError("model.layout.kind=anyres needs model.layout.pinpoints, as [[336,672],[672,336],[672,672]]")
    for pinpoint in spec.layout.pinpoints:
        if len(pinpoint) != 2 or min(pinpoint) < 1 or pinpoint[0] % spec.size or pinpoint[1] % spec.size:
            raise UserError(
                f"model.layout.pinpoints has {pinpoint}; each is [height, width] in multiples of "
                f"model.vision.image_size={spec.size}"
            )
    if spec.class_token or spec.queries is not None:
        raise UserError(
            "model.layout.kind=anyres reads embeddings line by line: it goes with neither "
            "model.vision.keep_class_token nor a projector of learned queries"
        )
