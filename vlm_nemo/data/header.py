"""Look at an image's header, and refuse what must not be decoded. No torch here: prepare's workers use it too.

Nothing is allocated for pixels before these checks: a 62 KB file may claim 65,500 x 65,500 of them.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import simplejpeg
from PIL import Image

from vlm_nemo.data.sample import BROKEN_IMAGE, IMAGE_SIZE, SampleError

MAX_PIXELS = 1 << 26
"""67 megapixels, 8192 x 8192."""
MAX_ASPECT = 200
"""Longer side over shorter side."""
MIN_SIDE = 8
"""Pixels; smaller ones are tracking pixels and spacers."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Formats that are read, and the extension that each gets in a shard."""
TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_ORIENTATION = 0x0112
PIL_ERRORS = (Exception,)
"""What PIL raises on files that are not what they claim to be: its plugins let anything through, TypeError too."""


class Header(NamedTuple):
    """What an image says about itself."""

    width: int
    """As shown (EXIF rotation applied), pixels."""
    height: int
    extension: str
    fast_jpeg: bool
    """A colour or grey JPEG: the fast and strict decoder may have it."""
    orientation: int
    """EXIF, 1 (upright) to 8."""


def read_header(data: bytes) -> Header:
    """Header of an encoded image. Raises SampleError ("broken image", "image size") if it must not be decoded."""
    if data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise SampleError(BROKEN_IMAGE, f"JPEG header: {error}") from None
        check_size(width, height)
        fast = colour in ("YCbCr", "RGB", "Gray")
        if fast and data.find(b"Exif\0\0", 0, 1 << 16) < 0:
            return Header(width, height, "jpg", True, 1)
    else:
        fast = False
    image = open_image(data)
    width, height = image.size
    check_size(width, height)
    orientation = read_orientation(image)
    if orientation in TRANSPOSED:
        width, height = height, width
    return Header(width, height, EXTENSIONS[str(image.format)], fast, orientation)


def open_image(data: bytes) -> Image.Image:
    """PIL's lazy image: header only. Raises SampleError if it is none of EXTENSIONS."""
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in EXTENSIONS if name != "MPO"])
    except PIL_ERRORS as error:
        # PIL's own text names the memory address of the buffer
        detail = f"{len(data)} bytes that are none of {', '.join(EXTENSIONS)}"
        raise SampleError(BROKEN_IMAGE, detail if isinstance(error, OSError) else type(error).__name__) from None


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def check_size(width: int, height: int) -> None:
    """Raises SampleError if an image of this many pixels is too large, too small or too long."""
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, below {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, above {MAX_PIXELS} pixels")
    if long > MAX_ASPECT * short:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, longer than {MAX_ASPECT} : 1")
