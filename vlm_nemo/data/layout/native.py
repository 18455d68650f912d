"""Qwen2-VL's own resolution: one view of the image's own shape, its sides rounded to whole embeddings."""

from __future__ import annotations

import math

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, run
from vlm_nemo.data.layout.spec import ImageSpec, reduced, view_tokens
from vlm_nemo.data.sample import IMAGE_SIZE, SampleError
from vlm_nemo.types import UserError

LONGEST_SHAPE = 200
"""Longer over shorter side of an image, at most."""


def plan_native(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """size: (width, height). Raises UserError for limits that do not go together."""
    layout = spec.layout
    if not 1 <= layout.min_pixels <= layout.max_pixels or layout.max_pixels < spec.stride**2:
        raise UserError(
            f"model.layout.min_pixels={layout.min_pixels} and max_pixels={layout.max_pixels} must be "
            f"1 <= min_pixels <= max_pixels, with room for one embedding ({spec.stride**2} pixels)"
        )
    to = smart_size(*size, spec.stride, layout.min_pixels, layout.max_pixels)
    grid = to[0] // spec.patch, to[1] // spec.patch
    tokens = view_tokens(spec, grid)
    places = spec.mrope and spec.queries is None and not spec.class_token
    return ImagePlan(
        canvases=(Canvas(steps=(to,), size=to, view=to),),
        grids=(grid,),
        embeddings=tokens,
        items=(run(0, tokens),),
        span=reduced(spec, grid) if places else None,
    )


def smart_size(width: int, height: int, stride: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) in multiples of stride, near the image's own, between least and most pixels where that goes.

    (640, 480, 28, 3136, 1003520) -> (476, 644)
    """
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise SampleError(IMAGE_SIZE, f"{width} x {height} pixels: longer than {LONGEST_SHAPE} times its other side")
    # round() as Python has it: 2.5 -> 2
    rows, columns = round(height / stride), round(width / stride)
    if rows * columns * stride**2 > most:
        beta = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / beta / stride)) for side in (height, width))
    elif rows * columns * stride**2 < least:
        beta = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * beta / stride) for side in (height, width))
    return rows * stride, columns * stride
