"""Look at an image's header, and refuse what must not be decoded. No torch here: prepare's workers use it too.

Nothing is allocated for pixels before these checks: a 62 KB file may claim 65,500 x 65,500 of them.
"""

from __future__ import annotations

import io
import struct
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
_TILE_SIDES = (322, 323)
_LARGE_TILE = 1 << 20
"""Pixels; a tile of a TIFF may be larger than the picture, but then at most this."""
_JPEG_ORIENTED = (b"Exif\0\0", b"tiff:Orientation")
"""What lies before the pixels of a JPEG that may have to be turned: EXIF, or XMP that says so."""
_JPEG_SCAN = b"\xff\xda"
"""Here the pixels of a JPEG begin, or those of the thumbnail in its EXIF."""
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
        scan = data.find(_JPEG_SCAN)
        if fast and all(data.find(word, 0, scan) < 0 for word in _JPEG_ORIENTED):
            return Header(width, height, "jpg", True, 1)
    else:
        fast = False
        if claimed := claimed_size(data):
            check_size(*claimed)
    image = open_image(data)
    width, height = image.size
    check_size(width, height)
    _check_tiles(image)
    orientation = read_orientation(image)
    if orientation in TRANSPOSED:
        width, height = height, width
    return Header(width, height, EXTENSIONS[str(image.format)], fast, orientation)


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a PNG, GIF, BMP or WebP claims, before PIL sees it; None for what is none of them.

    PIL lays out a WebP's canvas when it opens the file, and only warns about sizes below its own, higher limit.
    """
    if len(data) < 30:
        return None
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return struct.unpack(">II", data[16:24])
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return struct.unpack("<HH", data[6:10])
    if data[:2] == b"BM" and data[14] >= 40:  # a negative height: rows from the top
        width, height = struct.unpack("<ii", data[18:26])
        return abs(width), abs(height)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if data[12:16] == b"VP8 ":  # 14 bits each; the two highest bits ask for upscaling
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        if data[12:16] == b"VP8L":  # 14 bits each, less one, one after the other
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if data[12:16] == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


def open_image(data: bytes) -> Image.Image:
    """PIL's lazy image: header only. Raises SampleError if it is none of EXTENSIONS."""
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in EXTENSIONS if name != "MPO"])
    except Image.DecompressionBombError:
        raise SampleError(IMAGE_SIZE, f"above {MAX_PIXELS} pixels") from None
    except PIL_ERRORS as error:
        # PIL's own text names the memory address of the buffer
        detail = f"{len(data)} bytes that are none of {', '.join(EXTENSIONS)}"
        raise SampleError(BROKEN_IMAGE, detail if isinstance(error, OSError) else type(error).__name__) from None


def read_orientation(image: Image.Image) -> int:
    """By how much the decoder's pixels must be turned: EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none.

    A TIFF is turned by PIL itself as it is loaded.
    """
    if image.format == "TIFF":
        return 1
    try:
        # Not image.getexif(): that of a PNG decodes all pixels to look for EXIF behind them
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def _check_tiles(image: Image.Image) -> None:
    """A small TIFF may say that its tiles are huge, and libtiff makes room for a whole one."""
    if image.format != "TIFF":
        return
    sides = [Image.Image.getexif(image).get(tag, 1) for tag in _TILE_SIDES]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise SampleError(BROKEN_IMAGE, f"TIFF: tiles of {sides[0]} x {sides[1]}")
    if sides[0] * sides[1] > max(_LARGE_TILE, 2 * image.width * image.height):
        raise SampleError(IMAGE_SIZE, f"{image.width} x {image.height} in tiles of {sides[0]} x {sides[1]}")


def check_size(width: int, height: int) -> None:
    """Raises SampleError if an image of this many pixels is too large, too small or too long."""
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, below {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, above {MAX_PIXELS} pixels")
    if long > MAX_ASPECT * short:
        raise SampleError(IMAGE_SIZE, f"{width} x {height}, longer than {MAX_ASPECT} : 1")
