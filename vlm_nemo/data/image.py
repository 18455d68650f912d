"""Encoded images to patches of uint8, as their layout says; the device turns them into floats.

JPEGs go through simplejpeg, which refuses damaged files, everything else (CMYK too) through PIL. Resizing is PIL's
own by default, as Hugging Face's processors do it; training passes a faster one (resize.py). All of it releases
the GIL: threads decode in parallel. No torch here: a server of exported models has none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vlm_nemo.data.header import PIL_ERRORS, open_image, read_header
from vlm_nemo.data.layout.cut import Pixels, cut
from vlm_nemo.data.layout.images import plan_image, plan_sizes
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.pieces import EncodedText
from vlm_nemo.data.sample import BROKEN_IMAGE, WRONG_LENGTH, SampleError
from vlm_nemo.types import Images


class Resize(Protocol):
    """(pixels [H, W, 3], height, width) -> [height, width, 3]"""

    def __call__(self, pixels: Pixels, height: int, width: int, resample: str = ...) -> Pixels: ...


Augment = Callable[[Pixels], Pixels]
"""pixels [H, W, 3] -> [H, W, 3]"""

_WHITE = (255, 255, 255, 255)
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""EXIF orientation -> steps along rows and columns, after the transposition."""
SCRATCH = 12 << 20
"""Bytes, touched as they are needed: images up to 4 megapixels."""


class _Thread(threading.local):
    """A thread's memory for pixels that are resized at once: with fresh memory a JPEG takes a third longer."""

    def __init__(self) -> None:
        self.scratch = np.empty(SCRATCH, dtype=np.uint8)


_THREAD = _Thread()


_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def pil_resize(pixels: Pixels, height: int, width: int, resample: str = "bicubic") -> Pixels:
    """[H, W, 3] -> [height, width, 3]."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[resample]))


def plan_images(images: Sequence[bytes], spec: ImageSpec) -> list[ImagePlan]:
    """The plans of encoded images, from their headers alone. Raises SampleError ("broken image", "image size")."""
    headers = [read_header(data) for data in images]
    return plan_sizes(spec, [(header.width, header.height) for header in headers])


def decode_image(
    data: bytes, spec: ImageSpec, resize: Resize = pil_resize, augment: Augment | None = None
) -> tuple[Pixels, ImagePlan]:
    """[P, p*p*3] uint8 and the plan of an image that stands alone; see decode_images."""
    (plan,) = plan_images([data], spec)
    return _patches([data], [plan], spec, resize, augment), plan


def decode_images(
    images: Sequence[bytes],
    text: EncodedText,
    spec: ImageSpec,
    resize: Resize = pil_resize,
    augment: Augment | None = None,
) -> Images[NDArray[Any]]:
    """The images of one prompt or sample, in order, with the places that `text` keeps for them; there may be none.

    augment: applied to the whole image, before it is cut; it keeps the image's size. Raises SampleError ("broken
    image", "image size", "wrong length" for an image of another shape than the text was made for).
    """
    return replace(left_out(text, spec), patches=_patches(images, text.plans, spec, resize, augment))


def left_out(text: EncodedText, spec: ImageSpec) -> Images[NDArray[Any]]:
    """The images that `text` has places for, without their patches."""
    return Images(
        patches=np.empty((0, spec.patch * spec.patch * 3), dtype=np.uint8),
        grids=np.array([grid for plan in text.plans for grid in plan.grids], dtype=np.int64).reshape(-1, 2),
        views=np.array([len(plan.grids) for plan in text.plans], dtype=np.int64),
        embeddings=np.array([plan.embeddings for plan in text.plans], dtype=np.int64),
        slots=text.slots,
        sources=text.sources,
        shares=text.shares,
        tilings=tilings_of(text.plans, spec),
    )


def tilings_of(plans: Sequence[ImagePlan], spec: ImageSpec) -> NDArray[np.int64] | None:
    """[N, 2]: see `Images.tilings`; None where no tower asks for them."""
    if spec.tiles is None:
        return None
    return np.array([plan.tiling for plan in plans], dtype=np.int64).reshape(-1, 2)


def _patches(
    images: Sequence[bytes], plans: Sequence[ImagePlan], spec: ImageSpec, resize: Resize, augment: Augment | None
) -> Pixels:
    ends = np.cumsum([0, *(plan.cost for plan in plans)]).tolist()
    out = np.empty((ends[-1], spec.patch * spec.patch * 3), dtype=np.uint8)
    for data, planned, start, end in zip(images, plans, ends[:-1], ends[1:], strict=True):
        pixels = _decode(data, _THREAD.scratch)
        plan = plan_image(spec, (pixels.shape[1], pixels.shape[0]), len(images) == 1)
        if not plan.stands_like(planned):
            raise SampleError(
                WRONG_LENGTH,
                f"an image of {pixels.shape[1]} x {pixels.shape[0]} pixels, which the index beside the shard has "
                "otherwise; run `vlm-nemo prepare` again",
            )
        to = partial(resize, resample=spec.layout.resample)
        cut(pixels if augment is None else augment(pixels), plan, spec.patch, to, out[start:end])
    return out


def decode_pixels(data: bytes) -> Pixels:
    """[H, W, 3] uint8: upright, first frame, alpha over white. Raises SampleError ("broken image", "image size")."""
    return _decode(data, None)


def _decode(data: bytes, scratch: Pixels | None) -> Pixels:
    """[H, W, 3], in `scratch` if it fits."""
    header = read_header(data)
    if not header.fast_jpeg:
        return _upright(_decode_any(data), header.orientation)
    if scratch is not None and 3 * header.width * header.height > scratch.size:
        scratch = None
    return _upright(_decode_jpeg(data, scratch), header.orientation)


def _decode_jpeg(data: bytes, buffer: Pixels | None) -> Pixels:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True, buffer=buffer)
    except ValueError as error:
        raise SampleError(BROKEN_IMAGE, f"JPEG: {error}") from None


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5 to 8 lie on their side, 2, 4, 5 and 7 are mirrored."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical, horizontal = _FLIPS[orientation]
    return np.ascontiguousarray(pixels[::vertical, ::horizontal])


def _decode_any(data: bytes) -> Pixels:
    """[H, W, 3]: first frame, alpha over white, 16 bits to 8."""
    image = open_image(data)
    try:
        image.load()
        return np.array(_to_rgb(image))
    except PIL_ERRORS as error:
        raise SampleError(BROKEN_IMAGE, f"{image.format}: {type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits grey; PIL's own conversion clips instead of scaling
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, _WHITE), over).convert("RGB")
    return image.convert("RGB")
