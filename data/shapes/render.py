"""Draw a scene: scene -> JPEG bytes. Drawn four times too large and averaged down, so that edges are smooth."""

from __future__ import annotations

import io
import math
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from scenes import Scene, Thing

SIDE = 64
OVER = 4
"""Oversampling."""
QUALITY = 92

INK = {
    "red": (225, 35, 45),
    "orange": (255, 140, 20),
    "yellow": (255, 225, 40),
    "green": (40, 175, 70),
    "blue": (45, 110, 245),
    "purple": (145, 60, 205),
    "pink": (255, 130, 190),
    "white": (250, 250, 250),
}
BACKDROPS = (
    ((16, 20, 44), (36, 44, 84)),
    ((28, 18, 38), (58, 38, 70)),
    ((10, 32, 38), (22, 60, 66)),
    ((30, 30, 34), (62, 62, 68)),
    ((36, 22, 18), (70, 46, 40)),
)
RADIUS = {"large": 13.5, "small": 8.5}
"""Half the width of a shape, pixels of the final picture; a place is 32 wide."""
PAPER = (255, 246, 224)
"""The colour of printed words and digits, and of the border that makes each shape a sticker: with it the form of a
shape can be seen without its colour, so that a pair never seen together is still read."""
BORDER = 7
"""Width of the border in the oversampled picture."""


def outline(shape: str, x: float, y: float, r: float, tilt: float) -> list[tuple[float, float]]:
    """Corners of a shape centred at (x, y) that fits a circle-like radius r, turned by tilt degrees."""
    if shape == "square":
        points = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape == "triangle":
        points = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "cross":
        a = 0.36
        arm = [(-a, -a), (-a, -1.0), (a, -1.0)]
        points = arm + [(-y, x) for x, y in arm] + [(-x, -y) for x, y in arm] + [(y, -x) for x, y in arm]
    elif shape == "star":
        points = []
        for k in range(10):
            length = 1.08 if k % 2 == 0 else 0.45
            points.append((length * math.sin(k * math.pi / 5), -length * math.cos(k * math.pi / 5)))
    elif shape == "heart":
        points = []
        for k in range(48):
            t = k * math.pi / 24
            up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((math.sin(t) ** 3, -(up + 2.5) / 15.5))
    else:
        points = [(math.cos(k * math.pi / 24), math.sin(k * math.pi / 24)) for k in range(48)]
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return [(x + r * (c * px - s * py), y + r * (s * px + c * py)) for px, py in points]


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def backdrop(number: int) -> Image.Image:
    """A soft vertical gradient."""
    top, bottom = BACKDROPS[number % len(BACKDROPS)]
    strip = Image.new("RGB", (1, 2))
    strip.putdata([top, bottom])
    return strip.resize((SIDE * OVER, SIDE * OVER), Image.Resampling.BILINEAR)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    half = SIDE / 4
    column, row = thing.place % 2, thing.place // 2
    reach = {"large": 1.0, "small": 2.5}.get(thing.size, 1.0)
    x = (2 * column + 1) * half + reach * thing.dx
    y = (2 * row + 1) * half + reach * thing.dy
    if thing.kind == "shape":
        r = RADIUS[thing.size]
        body = outline(thing.shape, x * OVER, y * OVER, r * OVER, thing.tilt)
        pen.polygon(body, fill=INK[thing.colour])
        pen.line([*body, *body[:2]], fill=PAPER, width=BORDER, joint="curve")
        return
    size = 28 if thing.kind == "digit" else 15
    pen.text((x * OVER, y * OVER), thing.text, PAPER, font(size * OVER), "mm", stroke_width=1, stroke_fill=PAPER)


def render(scene: Scene) -> Image.Image:
    """The picture, SIDE x SIDE RGB."""
    canvas = backdrop(scene.backdrop % len(BACKDROPS)).copy()
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw(pen, thing)
    return canvas.reduce(OVER)


def jpeg(scene: Scene) -> bytes:
    """The picture as a JPEG without chroma subsampling (halved chroma would blur small shapes' colours)."""
    out = io.BytesIO()
    render(scene).save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()
