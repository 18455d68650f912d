"""Square tiles of a grid that is chosen for each image: InternVL's, Ovis2's and Llama 3.2's.

tiles    1 2 3      ovis   1 whole,      canvas  1 2      (fitted and padded,
         4 5 6             2 3                   3 4       the others are stretched)
         7 whole           4 5
"""

from __future__ import annotations

import math

import numpy as np

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, Item, Placeholders, run
from vlm_nemo.data.layout.spec import ImageSpec, view_tokens
from vlm_nemo.types import UserError

INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
"""Ovis2's marks; the k-th is replaced by the projector's extra row k."""
COVERED = 0.9
"""Of an image's area, by Ovis2's tiles at their own resolution: a grid that reaches it is good."""


def plan_tiles(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """InternVL: tiles of the grid nearest to the image's shape, then the whole image where there are several."""
    low, high = _limits(spec)
    rows, columns = nearest_grid(*size, spec.size, low, high)
    whole = (_whole(spec),) if spec.layout.thumbnail and rows * columns > 1 else ()
    views, tokens = rows * columns + len(whole), view_tokens(spec, spec.grid)
    return ImagePlan(
        canvases=(_stretched(spec, rows, columns), *whole),
        grids=(spec.grid,) * views,
        embeddings=views * tokens,
        items=(run(0, views * tokens),),
    )


def plan_ovis(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """Ovis2: the whole image, then tiles of the smallest grid that covers it well, with marks around and between.

    <IMG_START> whole <IMG_GRID> tile <IMG_COL> tile <IMG_ROW> tile <IMG_COL> tile <IMG_END>
    """
    rows, columns = covering_grid(*size, spec.size, _limits(spec)[1])
    tokens = view_tokens(spec, spec.grid)
    canvases = [_whole(spec)]
    items: list[Item] = [_mark("<IMG_START>"), run(0, tokens), _mark("<IMG_GRID>")]
    views = 1
    if rows * columns > 1:
        canvases.append(_stretched(spec, rows, columns))
        for row in range(rows):
            for column in range(columns):
                items.append(run(views * tokens, (views + 1) * tokens))
                views += 1
                if column < columns - 1:
                    items.append(_mark("<IMG_COL>"))
            if row < rows - 1:
                items.append(_mark("<IMG_ROW>"))
    items.append(_mark("<IMG_END>"))
    return ImagePlan(
        canvases=tuple(canvases), grids=(spec.grid,) * views, embeddings=views * tokens, items=tuple(items)
    )


def plan_canvas(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """Llama 3.2: tiles of the canvas that the image fits best, in its own shape, padded below and at the right."""
    width, height = size
    side = spec.size
    rows, columns = best_canvas(width, height, side, _limits(spec)[1])
    fitted = fit_canvas(width, height, (rows * side, columns * side), side)
    canvas = Canvas(steps=(fitted,), size=(rows * side, columns * side), view=(side, side))
    views, tokens = rows * columns, view_tokens(spec, spec.grid)
    return ImagePlan(
        canvases=(canvas,),
        grids=(spec.grid,) * views,
        embeddings=(spec.tiles or views) * tokens,
        items=(run(0, views * tokens),),
        tiling=None if spec.tiles is None else (rows, columns),
    )


def grids(low: int, high: int) -> list[tuple[int, int]]:
    """(a, b) with low <= a * b <= high, few tiles first: (1, 3) -> [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)]"""
    found = [(a, b) for a in range(1, high + 1) for b in range(1, high + 1) if low <= a * b <= high]
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def nearest_grid(width: int, height: int, side: int, low: int, high: int) -> tuple[int, int]:
    """(rows, columns) whose shape is nearest to the image's; of two alike the larger one, unless its tiles have more
    than twice the image's area. (800, 600, 448, 1, 12) -> (3, 4)"""
    best, least = (1, 1), math.inf
    for columns, rows in grids(low, high):
        off = abs(width / height - columns / rows)
        if off < least:
            best, least = (rows, columns), off
        elif off == least and width * height > 0.5 * side * side * columns * rows:
            best = (rows, columns)
    return best


def covering_grid(width: int, height: int, side: int, high: int) -> tuple[int, int]:
    """(rows, columns) as transformers' class has them: the fewest tiles that show COVERED of the image's area without
    shrinking it. It measures a grid as rows x columns and then lays it as columns x rows: a wide image is cut into
    tiles above one another."""
    measured = [(grid, _covered(width, height, grid, side) / (width * height)) for grid in grids(1, high)]
    good = [(grid, share) for grid, share in measured if share > COVERED]
    if good:
        columns, rows = min(good, key=lambda one: (one[0][0] * one[0][1], -one[1]))[0]
    else:
        columns, rows = min(measured, key=lambda one: (-one[1], one[0][0] * one[0][1]))[0]
    return rows, columns


def best_canvas(width: int, height: int, side: int, high: int) -> tuple[int, int]:
    """(rows, columns) of the canvas into which the image goes with the least enlargement, else with the least loss; of
    several the smallest."""
    sizes = [(rows, columns) for rows in range(1, high + 1) for columns in range(1, high + 1) if rows * columns <= high]
    scales = {grid: min(grid[0] * side / height, grid[1] * side / width) for grid in sizes}
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    return min((grid for grid in sizes if scales[grid] == chosen), key=lambda grid: grid[0] * grid[1])


def fit_canvas(width: int, height: int, canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) in the image's own shape: inside the canvas, and no larger than needed to fill a tile."""
    across, down = min(max(width, side), canvas[1]), min(max(height, side), canvas[0])
    if across / width < down / height:
        return min(math.floor(height * (across / width)) or 1, down), across
    return down, min(math.floor(width * (down / height)) or 1, across)


def _covered(width: int, height: int, grid: tuple[int, int], side: int) -> float:
    """Pixels that the tiles show when each is shrunk to its side at most; the last row and column take what is left."""
    down, across = height // grid[0], width // grid[1]
    total = 0.0
    for row in range(grid[0]):
        for column in range(grid[1]):
            wide = width - column * across if column == grid[1] - 1 else across
            high = height - row * down if row == grid[0] - 1 else down
            longer, shorter = float(max(wide, high)), float(min(wide, high))
            if longer > side:
                longer, shorter = side, shorter / longer * side
            total += longer * shorter
    return total


def _whole(spec: ImageSpec) -> Canvas:
    square = (spec.size, spec.size)
    return Canvas(steps=(square,), size=square, view=square)


def _stretched(spec: ImageSpec, rows: int, columns: int) -> Canvas:
    size = (rows * spec.size, columns * spec.size)
    return Canvas(steps=(size,), size=size, view=(spec.size, spec.size))


def _mark(name: str) -> Placeholders:
    return Placeholders(sources=np.array([-1 - INDICATORS.index(name)]), token=name)


def _limits(spec: ImageSpec) -> tuple[int, int]:
    low, high = spec.layout.min_tiles, spec.layout.max_tiles
    if not 1 <= low <= high:
        raise UserError(f"model.layout.min_tiles={low} and max_tiles={high} must be 1 <= min_tiles <= max_tiles")
    return low, high
