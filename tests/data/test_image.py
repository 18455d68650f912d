"""Decoding: faithful to PIL, upright, white behind alpha; and what must not be decoded is refused at the header."""

from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.raw_data import picture
from vlm_nemo.data.header import read_header
from vlm_nemo.data.image import Resize, decode_image, pil_resize
from vlm_nemo.data.layout import ImageSpec, count_tokens, image_spec
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import BROKEN_IMAGE, IMAGE_SIZE, SampleError
from vlm_nemo.types import UserError

MEAN = (0.48, 0.46, 0.41)
COLOUR = tuple(int(channel * 255) for channel in MEAN)
BICUBIC = Image.Resampling.BICUBIC


def spec(size: int, aspect: str) -> ImageSpec:
    return ImageSpec(size=size, tokens=4, aspect=aspect, mean=MEAN)


def by_pil(data: bytes, size: int, aspect: str) -> np.ndarray:
    """The textbook way: upright, RGB, made square (LLaVA-1.5's or CLIP's way), PIL's bicubic."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = image.size
    if aspect == "pad" and width != height:
        side = max(width, height)
        canvas = Image.new("RGB", (side, side), COLOUR)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    elif aspect == "crop":
        scale = size / min(width, height)
        wide = (size, int(height * scale)) if width <= height else (int(width * scale), size)
        image = image.resize(wide, BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), BICUBIC)).astype(int)


def distance(data: bytes, size: int, aspect: str, resize: Resize = torch_resize) -> int:
    ours = decode_image(data, spec(size, aspect), resize)
    assert ours.shape == (3, size, size) and ours.flags.c_contiguous
    return int(np.abs(ours.transpose(1, 2, 0).astype(int) - by_pil(data, size, aspect)).max())


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (64, 64), (40, 30), (700, 90), (97, 101)])
def test_within_two_levels_of_pil(size: tuple[int, int], aspect: str) -> None:
    data = picture(1, size)
    assert distance(data, 112, aspect) <= 2
    # PIL's own: to the bit, but that padding above and below is resized in the other order (up, then across)
    upright_pad = aspect == "pad" and size[1] > size[0]
    assert distance(data, 112, aspect, pil_resize) <= (1 if upright_pad else 0)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    assert distance(picture(2, (64, 64)), 64, "pad") == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(3, (60, 40), exif=exif.tobytes())
    header = read_header(data)
    assert (header.width, header.height) == ((40, 60) if orientation >= 5 else (60, 40))
    assert distance(data, 48, "squash") <= 2
    assert read_header(picture(3, (60, 40), "PNG", exif=exif.tobytes())).width == header.width


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("WEBP", "RGB"), ("GIF", "P"), ("JPEG", "L"), ("JPEG", "CMYK")],
)
def test_other_formats(form: str, mode: str) -> None:
    data = picture(4, (50, 50), form, mode)
    assert distance(data, 50, "pad") <= 2
    assert read_header(data).extension == {"JPEG": "jpg"}.get(form, form.lower())


def test_alpha_is_laid_over_white() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(stream, "PNG")
    assert decode_image(stream.getvalue(), spec(16, "pad"))[:, 3, 3].tolist() == [255, 127, 127]
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    assert decode_image(stream.getvalue(), spec(16, "pad"))[:, 3, 3].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16)).save(stream, "PNG")
    assert decode_image(stream.getvalue(), spec(16, "pad"))[:, 0, 0].tolist() == [128, 128, 128]


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(stream.getvalue(), spec(16, "pad"))[:, 0, 0].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds one byte of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    """A small JPEG whose frame header is rewritten."""
    data = bytearray(picture(5, (16, 16)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


JPEG = picture(6, (64, 64))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", BROKEN_IMAGE),
        (b"<html>404</html>", BROKEN_IMAGE),
        (JPEG[:3], BROKEN_IMAGE),
        (JPEG[:100], BROKEN_IMAGE),
        (JPEG[: len(JPEG) // 2], BROKEN_IMAGE),
        (JPEG[:-300] + b"\0" * 200 + JPEG[-100:], BROKEN_IMAGE),
        (picture(6, (64, 64), "PNG")[:-30], BROKEN_IMAGE),
        (png_header(20, 20), BROKEN_IMAGE),
        (picture(6, (1, 1), "PNG"), IMAGE_SIZE),
        (picture(6, (7, 300)), IMAGE_SIZE),
        (picture(6, (8, 1601)), IMAGE_SIZE),
        (png_header(9000, 9000), IMAGE_SIZE),
        (jpeg_bomb(65500, 65500), IMAGE_SIZE),
        (jpeg_bomb(9000, 9000), IMAGE_SIZE),
    ],
)
def test_bad_images_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(data, spec(32, "pad"))
    assert caught.value.reason == reason
    assert "0x" not in str(caught.value), "no memory address in a message"


def test_a_bomb_allocates_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (jpeg_bomb(65500, 65500), png_header(60000, 60000), png_header(1, 65000)):
        with pytest.raises(SampleError):
            decode_image(data, spec(32, "pad"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_image_spec_counts_placeholders() -> None:
    assert image_spec(336, 14, False, "pad", MEAN).tokens == 576
    assert count_tokens(image_spec(64, 16, True, "crop", MEAN), (40, 30)) == 17
    with pytest.raises(UserError, match="image_size=65"):
        image_spec(65, 16, False, "pad", MEAN)
    with pytest.raises(UserError, match="aspect=stretch"):
        image_spec(64, 16, False, "stretch", MEAN)
