"""Idefics3's and SmolVLM's rows of tiles, each with its place in words, then the whole image.

<fake_token_around_image><row_1_col_1> tile <fake_token_around_image><row_1_col_2> tile \\n
<fake_token_around_image><row_2_col_1> tile <fake_token_around_image><row_2_col_2> tile \\n
\\n<fake_token_around_image><global-img> whole <fake_token_around_image>
"""

from __future__ import annotations

import math

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, Item, run
from vlm_nemo.data.layout.spec import ImageSpec, view_tokens
from vlm_nemo.types import UserError

FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"
LARGEST = 4096
"""Pixels of a side, whatever longest_edge says."""


def plan_rows(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """size: (width, height). The image is resized three times, as transformers does it: to longest_edge, to multiples
    of a tile, and from there to the whole view."""
    side, longest = spec.size, spec.layout.longest_edge
    if longest is None or longest < 1:
        raise UserError(f"model.layout.kind=rows needs model.layout.longest_edge, as {4 * side} (4 tiles)")
    square = (side, side)
    first = scaled(*size, longest)
    second = multiples(*first, side)
    rows, columns = second[0] // side, second[1] // side
    tokens = view_tokens(spec, spec.grid)
    if rows * columns == 1:
        canvases: tuple[Canvas, ...] = (Canvas(steps=(first, square), size=square, view=square),)
        items: list[Item] = [FAKE + WHOLE, run(0, tokens), FAKE]
        views = 1
    else:
        canvases = (
            Canvas(steps=(first, second), size=second, view=square),
            Canvas(steps=(first, second, square), size=square, view=square),
        )
        items, views, text = [], 0, ""
        for row in range(rows):
            for column in range(columns):
                items += [f"{text}{FAKE}<row_{row + 1}_col_{column + 1}>", run(views * tokens, (views + 1) * tokens)]
                views, text = views + 1, ""
            text = "\n"
        items += [f"{text}\n{FAKE}{WHOLE}", run(views * tokens, (views + 1) * tokens), FAKE]
        views += 1
    return ImagePlan(canvases=canvases, grids=(spec.grid,) * views, embeddings=views * tokens, items=tuple(items))


def scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """(height, width) with the longer side `longest`, the shorter one even: (640, 480, 1456) -> (1092, 1456)"""
    shape = width / height
    if width >= height:
        width, height = longest, int(longest / shape)
        height += height % 2
    else:
        width, height = int(longest * shape), longest
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    shape = width / height
    if width >= height and width > LARGEST:
        width, height = LARGEST, int(LARGEST / shape)
    elif height > width and height > LARGEST:
        width, height = int(LARGEST * shape), LARGEST
    return max(height, 1), max(width, 1)


def multiples(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) rounded up to whole tiles, the longer side first: (1092, 1456, 364) -> (1092, 1456)"""
    shape = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / shape) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * shape) / side) * side
