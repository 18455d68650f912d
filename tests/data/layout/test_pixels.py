"""Every layout's views beside those of the family's own image processor, and how many of them there are."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.raw_data import picture, pixels_of
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.image import decode_image, pil_resize
from vlm_nemo.data.layout.images import count_tokens, plan_image, vision_cost
from vlm_nemo.data.layout.spec import ImageSpec, image_spec
from vlm_nemo.data.resize import torch_resize

SIZES = [(640, 480), (333, 517), (97, 101), (601, 37), (30, 450), (56, 56), (20, 16), (1001, 700)]
SIDE, PATCH = 56, 14
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows, columns in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]]
COMMON: dict[str, Any] = {"image_mean": MEAN, "image_std": STD}


def spec(layout: LayoutConfig, **changes: Any) -> ImageSpec:
    sizes: dict[str, Any] = {"size": SIDE, "patch": PATCH, "mean": MEAN}
    return image_spec(layout, **(sizes | changes))


def views(data: bytes, of: ImageSpec, resize: Any = pil_resize) -> list[NDArray[Any]]:
    """Our views, [H, W, 3] each."""
    patches, plan = decode_image(data, of, resize)
    ends = np.cumsum([rows * columns for rows, columns in plan.grids])
    return [pixels_of(part, grid) for part, grid in zip(np.split(patches, ends[:-1]), plan.grids, strict=True)]


def as_levels(theirs: Any) -> NDArray[Any]:
    """[n, 3, H, W] normalised -> [n, H, W, 3], 0 to 255."""
    return ((np.asarray(theirs) * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255).transpose(
        0, 2, 3, 1
    )


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def anyres(image: Image.Image) -> Any:
    from transformers import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **COMMON
    )
    return processor(image)["pixel_values"][0]


def tiles(image: Image.Image) -> Any:
    from transformers import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=6, **COMMON)
    return processor(image)["pixel_values"]


def ovis(image: Image.Image) -> Any:
    from transformers import Ovis2ImageProcessorPil

    processor = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6, **COMMON)
    return processor(image)["pixel_values"]


def canvas(image: Image.Image) -> Any:
    from transformers import MllamaImageProcessorPil

    found = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4, **COMMON)(image, return_tensors="np")
    return found["pixel_values"][0, 0, : found["num_tiles"][0][0]]


def rows(image: Image.Image) -> Any:
    from transformers import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}, **COMMON
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


def one_row(image: Image.Image) -> Any:
    from transformers import SmolVLMImageProcessorPil

    processor = SmolVLMImageProcessorPil(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, **COMMON)
    return processor(image, return_tensors="np")["pixel_values"][0]


def native(image: Image.Image) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 40, **COMMON)
    found = processor(image, return_tensors="np")
    _, down, across = found["image_grid_thw"][0].tolist()
    # (rows / 2, columns / 2, 2, 2, colour, frame, row, column) -> an image; both frames are the image
    patches = found["pixel_values"].reshape(down // 2, across // 2, 2, 2, 3, 2, PATCH, PATCH)
    assert np.array_equal(patches[:, :, :, :, :, 0], patches[:, :, :, :, :, 1])
    return patches[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, down * PATCH, across * PATCH)


def gemma(image: Image.Image) -> Any:
    from transformers import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(size=SQUARE, **COMMON)(image)["pixel_values"]


def blip(image: Image.Image) -> Any:
    from transformers import BlipImageProcessorPil

    return BlipImageProcessorPil(size=SQUARE, **COMMON)(image)["pixel_values"]


LAYOUTS: dict[str, tuple[ImageSpec, Callable[[Image.Image], Any]]] = {
    "anyres": (spec(LayoutConfig(kind="anyres", pinpoints=PINPOINTS)), anyres),
    "tiles": (spec(LayoutConfig(kind="tiles", max_tiles=6)), tiles),
    "ovis": (spec(LayoutConfig(kind="ovis", max_tiles=6)), ovis),
    "canvas": (spec(LayoutConfig(kind="canvas", max_tiles=4, resample="bilinear")), canvas),
    "rows": (spec(LayoutConfig(kind="rows", longest_edge=4 * SIDE, resample="lanczos")), rows),
    "one row": (spec(LayoutConfig(kind="rows", longest_edge=SIDE, resample="lanczos")), one_row),
    "native": (
        spec(LayoutConfig(kind="native", min_pixels=56 * 56, max_pixels=28 * 28 * 40), reduce="merge", factor=2),
        native,
    ),
    "gemma": (spec(LayoutConfig(aspect="squash", resample="bilinear")), gemma),
    "blip": (spec(LayoutConfig(aspect="squash"), queries=8), blip),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_views_are_those_of_the_family(name: str, size: tuple[int, int]) -> None:
    ours, theirs = LAYOUTS[name]
    data = picture(3, size, "PNG")
    expected, found = as_levels(theirs(opened(data))), views(data, ours)
    assert len(found) == len(expected)
    for view, other in zip(found, expected, strict=True):
        assert view.shape == other.shape
        assert np.abs(view - other).max() < 0.01, "PIL's resizing is theirs: to the bit"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_faster_resizing_is_within_two_levels(name: str) -> None:
    ours, theirs = LAYOUTS[name]
    for size in ((640, 480), (97, 101)):
        data = picture(4, size, "PNG")
        for view, other in zip(views(data, ours, torch_resize), as_levels(theirs(opened(data))), strict=True):
            assert np.abs(view - other).max() < 2.01


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_image_has_a_plan_that_adds_up(name: str) -> None:
    ours, _ = LAYOUTS[name]
    rng = np.random.default_rng(0)
    for width, height in rng.integers(8, 1500, (200, 2)).tolist():
        if max(width, height) > 100 * min(width, height):
            continue
        plan = plan_image(ours, (width, height))
        sources, shares = plan.sources
        assert shares is None
        assert sum(canvas.views for canvas in plan.canvases) == len(plan.grids)
        assert sources.max() < plan.embeddings and count_tokens(ours, [(width, height)]) >= len(sources)
        kept = sources[sources >= 0]
        assert len(np.unique(kept)) == len(kept), "no embedding has two places"
        if ours.layout.kind != "anyres":
            assert kept.tolist() == list(range(plan.embeddings))
        assert vision_cost(ours, [(width, height)]) == sum(math.prod(grid) for grid in plan.grids)
