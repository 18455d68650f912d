"""Looking before decoding: sizes come from the header, and what must not be decoded costs nothing."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.bombs import bombs, gif_bomb, jpeg_bomb, png_file, tiff_file, webp_bomb
from tests.data.raw_data import picture
from vlm_nemo.data.header import check_size, claimed_size, read_header
from vlm_nemo.data.image import decode_pixels
from vlm_nemo.data.sample import BROKEN_IMAGE, IMAGE_SIZE, SampleError

BOMBS = bombs()
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_size(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL warns about bombs that it would still decode
        for look in (read_header, decode_pixels):
            with pytest.raises(SampleError) as caught:
                look(BOMBS[name])
            assert caught.value.reason == IMAGE_SIZE
            assert "0x" not in str(caught.value), "no memory address in a message"


CHILD = """
import resource, sys
from tests.data.bombs import bombs
from tests.data.raw_data import picture
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import IMAGE_SIZE, SampleError

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what + ":"))

spec = image_spec(LayoutConfig(), size=32, patch=16)
for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
    decode_image(picture(1, (64, 48), form), spec, torch_resize)
bad = bombs()
before = kilobytes("VmHWM")
# Not even untouched memory may be asked for
limit = kilobytes("VmSize") * 1024 + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, data in bad.items():
    try:
        decode_image(data, spec, torch_resize)
    except SampleError as error:
        if error.reason != IMAGE_SIZE:
            sys.exit(f"{name}: {error}")
    else:
        sys.exit(f"{name}: decoded")
print((kilobytes("VmHWM") - before) / 1024)
"""


def test_bombs_allocate_nothing() -> None:
    # In a process of its own: in a grown one, memory that was freed before would hide what a bomb takes
    child = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert float(child.stdout) < 50, "megabytes"


@given(width=st.integers(1, 16383), height=st.integers(1, 16383), kind=st.sampled_from(["VP8", "VP8L", "VP8X"]))
@settings(deadline=None, max_examples=60)
def test_a_webp_claims_what_is_written(width: int, height: int, kind: str) -> None:
    assert claimed_size(webp_bomb(width, height, kind)) == (width, height)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP"])
def test_a_claim_is_what_pil_finds(form: str) -> None:
    for size in ((40, 30), (301, 203)):
        assert claimed_size(picture(1, size, form)) == size
        header = read_header(picture(1, size, form))
        assert (header.width, header.height) == size
    assert claimed_size(picture(1, (40, 30), "WEBP", "RGBA", lossless=True)) == (40, 30)


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"\xff\xd8\xff", b"II*\0", b"BM"]),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_read_or_refused(data: bytes, start: bytes) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):  # PIL's, about damaged EXIF
            header = read_header(start + data)
    except SampleError as error:
        assert error.reason in (BROKEN_IMAGE, IMAGE_SIZE)
    else:
        check_size(header.width, header.height)


def test_a_header_is_read_without_the_pixels() -> None:
    stream = io.BytesIO()
    Image.effect_noise((3000, 2000), 80).convert("RGB").save(stream, "PNG", compress_level=1)
    data = stream.getvalue()
    started = time.process_time()
    for _ in range(10):
        assert read_header(data).width == 3000
    looked = (time.process_time() - started) / 10
    started = time.process_time()
    decode_pixels(data)
    assert looked < 0.2 * (time.process_time() - started)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_says_the_size_that_is_decoded(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(3, (60, 40), form, exif=exif if form == "TIFF" else exif.tobytes())
    header = read_header(data)
    assert (header.height, header.width) == decode_pixels(data).shape[:2]
    assert (header.width, header.height) == ((40, 60) if orientation >= 5 else (60, 40))


def test_tiles_larger_than_a_small_tiff_are_read() -> None:
    assert read_header(tiff_file(100, 90, 256)).width == 100
    with pytest.raises(SampleError, match="tiles of 4096 x 4096"):
        read_header(tiff_file(100, 90, 4096))


def test_text_in_a_png_is_limited() -> None:
    with pytest.raises(SampleError) as caught:
        read_header(png_file(20, 20, text=b"x" * (8 << 20)))
    assert caught.value.reason == BROKEN_IMAGE


def test_sizes_just_inside() -> None:
    for size in ((8, 8), (1600, 8), (8192, 8192)):
        check_size(*size)
    assert read_header(jpeg_bomb(8192, 8192)).width == 8192
    assert claimed_size(gif_bomb(8000, 8000)) == (8000, 8000)
