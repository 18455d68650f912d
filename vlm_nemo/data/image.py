"""Encoded image to a square of uint8, [3, S, S]; the device turns it into floats.

JPEGs go through simplejpeg, which refuses damaged files, everything else (CMYK too) through PIL; resizing is PyTorch's
antialiased bicubic on uint8, within two levels of PIL's. All of it releases the GIL: threads decode in parallel.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from vlm_nemo.data.header import PIL_ERRORS, open_image, read_header
from vlm_nemo.data.layout import ImageSpec
from vlm_nemo.data.sample import BROKEN_IMAGE, SampleError

_WHITE = (255, 255, 255, 255)
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""EXIF orientation -> steps along rows and columns, after the transposition."""


def decode_image(data: bytes, spec: ImageSpec) -> Tensor:
    """[3, S, S] uint8, contiguous. Raises SampleError ("broken image", "image size")."""
    header = read_header(data)
    pixels = _upright(_decode_jpeg(data), header.orientation) if header.fast_jpeg else _decode_any(data)
    # Batch first, permuted last: only so does PyTorch see channels last, the layout that it resizes fastest
    return square(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), spec)[0].contiguous()


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        raise SampleError(BROKEN_IMAGE, f"JPEG: {error}") from None


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation: 5 to 8 lie on their side, 2, 4, 5 and 7 are mirrored."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical, horizontal = _FLIPS[orientation]
    return np.ascontiguousarray(pixels[::vertical, ::horizontal])


def _decode_any(data: bytes) -> NDArray[np.uint8]:
    """[H, W, 3]: first frame, upright, alpha over white, 16 bits to 8."""
    image = open_image(data)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
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


def square(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """[1, 3, H, W] uint8 -> [1, 3, S, S].

    pad: what padding to a square of the mean colour and then resizing gives (LLaVA-1.5), without making that square:
        the long side is resized first, then the short side is padded and resized.
    crop: the short side becomes S, the middle is kept (CLIP).
    squash: both sides become S.
    """
    size = spec.size
    height, width = pixels.shape[-2:]
    if height == width or spec.aspect == "squash":
        return _resize(pixels, size, size)
    if spec.aspect == "crop":
        if height < width:
            pixels = _resize(pixels, size, int(size * width / height))
        else:
            pixels = _resize(pixels, int(size * height / width), size)
        top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
        return pixels[..., top : top + size, left : left + size]
    colour = torch.tensor([int(channel * 255) for channel in spec.mean], dtype=torch.uint8)
    if width > height:
        pixels = _resize(pixels, height, size)
        canvas = _canvas(colour, width, size)
        top = (width - height) // 2
        canvas[..., top : top + height, :] = pixels
    else:
        pixels = _resize(pixels, size, width)
        canvas = _canvas(colour, size, height)
        left = (height - width) // 2
        canvas[..., left : left + width] = pixels
    return _resize(canvas, size, size)


def _canvas(colour: Tensor, height: int, width: int) -> Tensor:
    """[1, 3, H, W] of one colour, channels last."""
    return colour.expand(1, height, width, 3).contiguous().permute(0, 3, 1, 2)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
