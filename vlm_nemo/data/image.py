"""Encoded image to a square of uint8, [3, S, S]; the device turns it into floats.

JPEGs go through simplejpeg, which refuses damaged files, everything else (CMYK too) through PIL. Resizing is bicubic:
PIL's own by default, as Hugging Face's processors do it; training passes a faster one (resize.py). All of it releases
the GIL: threads decode in parallel. No torch here: a server of exported models has none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vlm_nemo.data.header import PIL_ERRORS, open_image, read_header
from vlm_nemo.data.layout import ImageSpec
from vlm_nemo.data.sample import BROKEN_IMAGE, SampleError

Pixels = NDArray[np.uint8]
Resize = Callable[[Pixels, int, int], Pixels]
"""(pixels [H, W, 3], height, width) -> [height, width, 3]"""
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


def pil_resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """[H, W, 3] -> [height, width, 3]."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def decode_image(data: bytes, spec: ImageSpec, resize: Resize = pil_resize, augment: Augment | None = None) -> Pixels:
    """[3, S, S] uint8, contiguous; augment: applied to the whole image, before it is made square.

    Raises SampleError ("broken image", "image size").
    """
    pixels = _decode(data, _THREAD.scratch)
    return square_image(pixels if augment is None else augment(pixels), spec, resize)


def decode_images(
    images: Sequence[bytes], spec: ImageSpec, resize: Resize = pil_resize, augment: Augment | None = None
) -> Pixels:
    """[n, 3, S, S] uint8: the images of one prompt or sample, in order; n may be 0."""
    if len(images) == 1:
        return decode_image(images[0], spec, resize, augment)[None]
    if not images:
        return np.empty((0, 3, spec.size, spec.size), dtype=np.uint8)
    return np.stack([decode_image(data, spec, resize, augment) for data in images])


def decode_pixels(data: bytes) -> Pixels:
    """[H, W, 3] uint8: upright, first frame, alpha over white. Raises SampleError ("broken image", "image size")."""
    return _decode(data, None)


def square_image(pixels: Pixels, spec: ImageSpec, resize: Resize = pil_resize) -> Pixels:
    """[H, W, 3] -> [3, S, S] uint8, contiguous.

    pad: what padding to a square of the mean colour and then resizing gives (LLaVA-1.5), without making that square:
        the long side is resized first, then the short side is padded and resized.
    crop: the short side becomes S, the middle is kept (CLIP).
    squash: both sides become S.
    """

    def to(height: int, width: int, image: Pixels) -> Pixels:
        return image if image.shape[:2] == (height, width) else resize(image, height, width)

    size = spec.size
    height, width = pixels.shape[:2]
    if height == width or spec.aspect == "squash":
        pixels = to(size, size, pixels)
    elif spec.aspect == "crop":
        wide = height < width
        pixels = to(*((size, int(size * width / height)) if wide else (int(size * height / width), size)), pixels)
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        pixels = pixels[top : top + size, left : left + size]
    else:
        colour = np.array([int(channel * 255) for channel in spec.mean], dtype=np.uint8)
        if width > height:
            canvas = np.broadcast_to(colour, (width, size, 3)).copy()
            canvas[(width - height) // 2 :][:height] = to(height, size, pixels)
        else:
            canvas = np.broadcast_to(colour, (size, height, 3)).copy()
            canvas[:, (height - width) // 2 :][:, :width] = to(size, width, pixels)
        pixels = to(size, size, canvas)
    return np.array(pixels.transpose(2, 0, 1), order="C")  # always a copy: the pixels may lie in a thread's scratch


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
