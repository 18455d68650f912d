"""Decoding: faithful to PIL, upright, white behind alpha; and what must not be decoded is refused at the header."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.bombs import png_file, sixteen_bit_png
from tests.data.raw_data import picture, pixels_of
from vlm_nemo.data import image
from vlm_nemo.data.chat import TEMPLATES, encode_prompt
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.header import read_header
from vlm_nemo.data.image import Resize, decode_image, decode_images, decode_pixels, pil_resize, plan_images
from vlm_nemo.data.layout.cut import Pixels
from vlm_nemo.data.layout.images import count_tokens
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.layout.spec import ImageSpec, image_spec
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import BROKEN_IMAGE, IMAGE_SIZE, WRONG_LENGTH, Message, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

MEAN = (0.48, 0.46, 0.41)
COLOUR = tuple(int(channel * 255) for channel in MEAN)
BICUBIC = Image.Resampling.BICUBIC


def spec(size: int, aspect: str) -> ImageSpec:
    return image_spec(LayoutConfig(aspect=aspect), size=size, patch=size // 2, mean=MEAN)


def square(data: bytes, spec: ImageSpec, resize: Resize = pil_resize) -> Pixels:
    """The one view, [S, S, 3]."""
    patches, plan = decode_image(data, spec, resize)
    assert plan.grids == (spec.grid,) and patches.flags.c_contiguous
    return pixels_of(patches, spec.grid)


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
    ours = square(data, spec(size, aspect), resize)
    assert ours.shape == (size, size, 3)
    return int(np.abs(ours.astype(int) - by_pil(data, size, aspect)).max())


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
    assert square(stream.getvalue(), spec(16, "pad"))[3, 3].tolist() == [255, 127, 127]
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    assert square(stream.getvalue(), spec(16, "pad"))[3, 3].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16)).save(stream, "PNG")
    assert square(stream.getvalue(), spec(16, "pad"))[0, 0].tolist() == [128, 128, 128]


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
        (png_file(20, 20), BROKEN_IMAGE),
        (picture(6, (1, 1), "PNG"), IMAGE_SIZE),
        (picture(6, (7, 300)), IMAGE_SIZE),
        (picture(6, (8, 1601)), IMAGE_SIZE),
    ],
)
def test_bad_images_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(data, spec(32, "pad"))
    assert caught.value.reason == reason
    assert "0x" not in str(caught.value), "no memory address in a message"


SCENE = np.asarray(Image.open(io.BytesIO(picture(7, (61, 43), "PNG"))))
ALPHA = np.linspace(0, 255, 61 * 43).astype(np.uint8).reshape(43, 61)


def encoded(mode: str, form: str, **how: Any) -> bytes:
    """SCENE in that mode; modes with A get ALPHA."""
    image = Image.fromarray(SCENE)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(ALPHA))
    stream = io.BytesIO()
    image.convert(mode).save(stream, form, **how)
    return stream.getvalue()


def over_white(data: bytes) -> np.ndarray:
    """What PIL makes of the first frame, alpha laid over white by hand; [H, W, 3] float."""
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), dtype=float)
    alpha = rgba[:, :, 3:] / 255
    return rgba[:, :, :3] * alpha + 255 * (1 - alpha)


EVERY_MODE = {
    "JPEG 4:4:4": encoded("RGB", "JPEG", subsampling=0),
    "JPEG 4:2:2": encoded("RGB", "JPEG", subsampling=1),
    "JPEG 4:2:0": encoded("RGB", "JPEG", subsampling=2),
    "JPEG progressive": encoded("RGB", "JPEG", progressive=True),
    "JPEG optimised, restarts": encoded("RGB", "JPEG", optimize=True, restart_marker_rows=1),
    "JPEG RGB": encoded("RGB", "JPEG", keep_rgb=True),
    "JPEG grey": encoded("L", "JPEG"),
    "JPEG CMYK": encoded("CMYK", "JPEG"),
    "PNG 1": encoded("1", "PNG"),
    "PNG L": encoded("L", "PNG"),
    "PNG LA": encoded("LA", "PNG"),
    "PNG P": encoded("P", "PNG"),
    "PNG P, one transparent": encoded("P", "PNG", transparency=3),
    "PNG P, alpha table": encoded("P", "PNG", transparency=bytes(range(256))),
    "PNG RGB": encoded("RGB", "PNG"),
    "PNG RGB, one transparent": encoded("RGB", "PNG", transparency=tuple(SCENE[0, 0].tolist())),
    "PNG RGBA": encoded("RGBA", "PNG"),
    "WEBP lossy": encoded("RGB", "WEBP"),
    "WEBP lossless": encoded("RGB", "WEBP", lossless=True),
    "WEBP alpha": encoded("RGBA", "WEBP", lossless=True),
    "GIF": encoded("P", "GIF"),
    "GIF interlaced, transparent": encoded("P", "GIF", interlace=1, transparency=5),
    "BMP": encoded("RGB", "BMP"),
    "BMP P": encoded("P", "BMP"),
    "TIFF": encoded("RGB", "TIFF"),
    "TIFF deflated": encoded("RGB", "TIFF", compression="tiff_adobe_deflate"),
    "TIFF CMYK": encoded("CMYK", "TIFF"),
    "TIFF RGBA": encoded("RGBA", "TIFF"),
}


@pytest.mark.parametrize("name", EVERY_MODE)
def test_pixels_are_pils_in_every_mode(name: str) -> None:
    found = decode_pixels(EVERY_MODE[name])
    assert found.shape == SCENE.shape and found.dtype == np.uint8
    # JPEG and what has no alpha: to the bit; alpha is rounded, PIL's way and ours
    assert np.abs(found - over_white(EVERY_MODE[name])).max() <= (
        1 if "A" in name.split(" ", 1)[-1] or "alpha" in name else 0
    )


def decode_together(datas: list[bytes], spec: ImageSpec, tokenizer: Tokenizer) -> Pixels:
    messages: list[Message] = [{"role": "user", "content": "<image>" * len(datas)}]
    text = encode_prompt(messages, tokenizer, TEMPLATES["plain"], plan_images(datas, spec))
    images = decode_images(datas, text, spec)
    assert images.views.tolist() == [1] * len(datas) and images.embeddings.tolist() == [4] * len(datas)
    assert images.grids.tolist() == [[2, 2]] * len(datas)
    return images.patches


def test_a_text_without_images_has_none(tokenizer: Tokenizer) -> None:
    text = encode_prompt([{"role": "user", "content": "hue?"}], tokenizer, TEMPLATES["plain"], [])
    images = decode_images([], text, spec(32, "pad"))
    assert images.count == 0 and images.patches.shape == (0, 768) and images.grids.shape == (0, 2)
    assert not len(images.slots) and not len(images.sources) and images.slots.dtype == np.int64


def test_an_image_of_another_shape_than_the_index_says_is_refused(tokenizer: Tokenizer) -> None:
    messages: list[Message] = [{"role": "user", "content": "<image>"}]
    where = spec(32, "pad")
    text = encode_prompt(messages, tokenizer, TEMPLATES["plain"], [plain(5)])
    with pytest.raises(SampleError, match="40 x 30 pixels") as caught:
        decode_images([picture(1)], text, where)
    assert caught.value.reason == WRONG_LENGTH


def test_images_do_not_share_memory(tokenizer: Tokenizer) -> None:
    # Decoding goes through memory that a thread uses again and again; what it hands out must not lie there
    datas = [picture(i, (48, 48)) for i in range(3)]
    for size in (48, 20):
        together = decode_together(datas, spec(size, "pad"), tokenizer)
        alone = [decode_image(data, spec(size, "pad"))[0] for data in datas]
        kept = [pixels.copy() for pixels in alone]
        decode_image(picture(9, (48, 48)), spec(size, "pad"))
        assert np.array_equal(alone, kept) and np.array_equal(together, np.concatenate(kept))
        single = decode_together(datas[:1], spec(size, "pad"), tokenizer)
        assert single.shape == (4, 3 * (size // 2) ** 2) and np.array_equal(single, kept[0])
    whole = decode_pixels(datas[0])
    before = whole.copy()
    decode_pixels(datas[1])
    decode_image(datas[2], spec(48, "pad"))
    assert np.array_equal(whole, before)


def test_threads_decode_what_one_does() -> None:
    datas = [picture(i, (60 + i, 50)) for i in range(24)] * 4
    expected = [decode_image(data, spec(32, "pad"), torch_resize)[0] for data in datas]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda data: decode_image(data, spec(32, "pad"), torch_resize)[0], datas))
    assert np.array_equal(found, expected)


def test_an_image_larger_than_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(1, (500, 333))
    expected, _ = decode_image(data, spec(64, "pad"))
    monkeypatch.setattr(image._THREAD, "scratch", np.empty(500 * 333 * 3 - 1, dtype=np.uint8))
    assert np.array_equal(decode_image(data, spec(64, "pad"))[0], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_keep_the_high_byte(channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, channels), dtype=np.uint16)
    high = (samples >> 8).astype(float)
    colour, alpha = (high[:, :, :-1], high[:, :, -1:] / 255) if channels in (2, 4) else (high, 1.0)
    found = decode_pixels(sixteen_bit_png(samples))
    assert found.shape == (20, 30, 3)
    assert np.abs(found - (colour * alpha + 255 * (1 - alpha))).max() <= (1 if channels in (2, 4) else 0)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    stream = io.BytesIO()
    frames[0].save(
        stream, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert decode_pixels(stream.getvalue()).reshape(-1, 3).tolist() == [[255, 0, 0]] * 256


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(progressive: bool) -> None:
    data = picture(8, (120, 90), progressive=progressive)
    for end in range(2, len(data) - 1, 7):
        with pytest.raises(SampleError) as caught:
            decode_pixels(data[:end])
        assert caught.value.reason == BROKEN_IMAGE
    decode_pixels(data)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_other_formats_cut_in_the_middle_are_refused(form: str) -> None:
    data = picture(8, (120, 90), form)
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(SampleError) as caught:
            decode_pixels(data[: int(share * len(data))])
        assert caught.value.reason == BROKEN_IMAGE


def test_image_spec_counts_placeholders() -> None:
    layout = LayoutConfig()
    assert count_tokens(image_spec(layout, size=336, patch=14), [(40, 30)]) == 576
    assert count_tokens(image_spec(layout, size=64, patch=16, class_token=True), [(40, 30)]) == 17
    assert count_tokens(image_spec(layout, size=64, patch=16, reduce="average_pool", factor=2), [(40, 30)]) == 4
    assert count_tokens(image_spec(layout, size=48, patch=16, reduce="hidden_stride", factor=2), [(40, 30)]) == 4
    assert count_tokens(image_spec(layout, size=64, patch=16, queries=7, reduce="merge", factor=3), [(40, 30)]) == 7
    assert count_tokens(image_spec(layout, size=64, patch=16, cross_attention=True), [(40, 30)]) == 1
    assert count_tokens(image_spec(layout, size=384, patch=14), [(40, 30)]) == 27 * 27, "SigLIP leaves six pixels out"
    with pytest.raises(UserError, match="patch_size=66"):
        image_spec(layout, size=65, patch=66)
    with pytest.raises(UserError, match="aspect=stretch"):
        image_spec(LayoutConfig(aspect="stretch"), size=64, patch=16)
    with pytest.raises(UserError, match="factor=3 does not divide a view of 4 x 4"):
        image_spec(layout, size=64, patch=16, reduce="merge", factor=3)
    with pytest.raises(UserError, match="class token has no neighbours"):
        image_spec(layout, size=64, patch=16, reduce="merge", factor=2, class_token=True)
