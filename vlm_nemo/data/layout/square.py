"""One square view an image: LLaVA-1.5's padding, CLIP's centre crop, Gemma 3's stretching.

pad   +------+    crop    ......      squash  +------+
      |######|          +.+----+.+            |######|
      |######|          |.|####|.|            |######|
      +------+          +.+----+.+            +------+
"""

from __future__ import annotations

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, run
from vlm_nemo.data.layout.spec import ImageSpec, view_tokens


def plan_square(spec: ImageSpec, size: tuple[int, int]) -> ImagePlan:
    """size: (width, height)."""
    tokens = view_tokens(spec, spec.grid)
    return ImagePlan(
        canvases=(square_canvas(spec, *size),), grids=(spec.grid,), embeddings=tokens, items=(run(0, tokens),)
    )


def square_canvas(spec: ImageSpec, width: int, height: int) -> Canvas:
    """pad: padding to a square of the mean colour, then resizing (LLaVA-1.5); crop: the short side becomes S, the
    middle is kept (CLIP); squash: both sides become S."""
    side, square = spec.size, (spec.size, spec.size)
    if width == height or spec.layout.aspect == "squash":
        return Canvas(steps=(square,), size=square, view=square)
    if spec.layout.aspect == "crop":
        wide = height < width
        to = (side, int(side * width / height)) if wide else (int(side * height / width), side)
        return Canvas(steps=(to,), size=square, view=square, corner=(-((to[0] - side) // 2), -((to[1] - side) // 2)))
    red, green, blue = (int(channel * 255) for channel in spec.mean)
    return Canvas(steps=(), size=square, view=square, padded=True, colour=(red, green, blue))
