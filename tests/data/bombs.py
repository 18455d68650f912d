"""Small files that claim to be huge pictures, one a format, and a writer of PNGs that PIL itself cannot write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.data.raw_data import picture


def png_file(
    width: int, height: int, depth: int = 8, colour: int = 2, pixels: bytes = b"0", text: bytes = b""
) -> bytes:
    """depth: bits a sample; colour: PNG's colour type; pixels: rows, each after its filter byte; text: a zTXt chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def sixteen_bit_png(samples: np.ndarray) -> bytes:
    """[H, W, 1 to 4] uint16: grey, grey and alpha, RGB, RGBA."""
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png_file(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def jpeg_bomb(width: int, height: int, progressive: bool = False) -> bytes:
    """A small JPEG whose frame header is rewritten."""
    data = bytearray(picture(5, (16, 16), progressive=progressive))
    start = data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_bomb(width: int, height: int, *, in_frame: bool = False) -> bytes:
    """A GIF with a large screen, or a small screen and a large first frame."""
    data = bytearray(picture(5, (16, 16), "GIF", "P"))
    at = data.index(b"\x2c\0\0\0\0\x10\0\x10\0") + 5 if in_frame else 6
    data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_bomb(width: int, height: int, kind: str) -> bytes:
    """kind: VP8 (lossy), VP8L (lossless), VP8X (extended: alpha, animation, EXIF)."""
    how = {"VP8": {}, "VP8L": {"lossless": True}, "VP8X": {"exif": b"Exif\0\0" + Image.Exif().tobytes()}}[kind]
    data = bytearray(picture(5, (16, 16), "WEBP", **how))
    assert data[12:16] == kind.ljust(4).encode()
    if kind == "VP8":
        data[26:30] = struct.pack("<HH", width, height)
    elif kind == "VP8L":
        bits = int.from_bytes(data[21:25], "little") >> 28 << 28
        data[21:25] = (bits | (height - 1) << 14 | width - 1).to_bytes(4, "little")
    else:
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def bmp_bomb(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "BMP")
    data = bytearray(stream.getvalue())
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_file(width: int, height: int, tile: int) -> bytes:
    """Grey, deflated, in tiles of tile x tile pixels."""
    fields = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 300, 325: 40}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + struct.pack("<I", 0)
    return head.ljust(300, b"\0") + zlib.compress(b"\0" * 1000).ljust(100, b"\0")


def bombs() -> dict[str, bytes]:
    """Name -> bytes: each must be refused as "image size"."""
    return {
        "jpeg 65500": jpeg_bomb(65500, 65500),
        "jpeg progressive": jpeg_bomb(65500, 65500, progressive=True),
        "jpeg 9000": jpeg_bomb(9000, 9000),
        "png 60000": png_file(60000, 60000),
        "png 2^31": png_file(2**31 - 1, 2**31 - 1),
        "png 9000": png_file(9000, 9000),
        "png line": png_file(1, 65000),
        "gif screen": gif_bomb(65535, 65535),
        "gif screen 12000": gif_bomb(12000, 12000),
        "gif frame": gif_bomb(65535, 65535, in_frame=True),
        "gif frame 9000": gif_bomb(9000, 9000, in_frame=True),
        "webp lossy": webp_bomb(16383, 16383, "VP8"),
        "webp lossless": webp_bomb(16384, 16384, "VP8L"),
        "webp extended": webp_bomb(16383, 16383, "VP8X"),
        "webp extended 2^24": webp_bomb(1 << 24, 200, "VP8X"),
        "webp 12000": webp_bomb(12000, 12000, "VP8X"),
        "bmp": bmp_bomb(60000, 60000),
        "bmp 12000": bmp_bomb(12000, 12000),
        "tiff": tiff_file(60000, 60000, 256),
        "tiff tile": tiff_file(16, 16, 40000),
        "1 x 1": picture(6, (1, 1), "PNG"),
        "line": picture(6, (8, 1601)),
    }
