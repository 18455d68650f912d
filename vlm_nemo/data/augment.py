"""Random crops, colour jitter and text dropout: pure functions of pixels or messages and of the sample's own generator.

All are off by default. The generator depends on (seed, source, epoch, record) alone, so a sample is changed in the same
way on every rank and after every resume, and in another way in its next epoch.

The plan counts tokens before anything is decoded, and what it counted stays enough: an augmented image has the size
of the image, and text dropout only takes text away; the room that it frees becomes padding at the row's end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

from vlm_nemo.data.config import AugmentConfig
from vlm_nemo.data.image import Resize, pil_resize
from vlm_nemo.data.layout.cut import Pixels
from vlm_nemo.data.sample import Message
from vlm_nemo.types import IMAGE_MARKER, UserError

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def check_augment(cfg: AugmentConfig) -> None:
    """Raises UserError for a range that is none, or a value out of it."""
    for name, span, most in (("crop_scale", cfg.crop_scale, 1.0), ("crop_ratio", cfg.crop_ratio, 100.0)):
        if len(span) != 2 or not 0 < span[0] <= span[1] <= most:
            raise UserError(f"data.augment.{name}={list(span)} must be [lowest, highest], above 0 and at most {most:g}")
    if list(cfg.crop_ratio) != [1.0, 1.0] and not _crops(cfg):
        raise UserError(
            f"data.augment.crop_ratio={list(cfg.crop_ratio)} does nothing to a crop of the whole area; "
            "lower data.augment.crop_scale, or leave the ratio at [1, 1]"
        )
    for name, strength in _strengths(cfg).items():
        most = 0.5 if name == "hue" else 100.0
        if not 0 <= strength <= most:
            raise UserError(f"data.augment.{name}={strength} must be 0 to {most:g}")
    if not 0 <= cfg.text_dropout <= 1:
        raise UserError(f"data.augment.text_dropout={cfg.text_dropout} is a probability, 0 to 1")


def changes_images(cfg: AugmentConfig) -> bool:
    """Whether `augment_image` does anything."""
    return _crops(cfg) or any(_strengths(cfg).values())


def sample_rng(seed: int, source: str, epoch: int, record: int) -> np.random.Generator:
    """The generator of one sample in one epoch. Use it for the messages first, then for the images in their order."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{record}/{source}".encode(), digest_size=16).digest()
    # Named, not default_rng: its algorithm may change with a version of NumPy
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def augment_image(pixels: Pixels, cfg: AugmentConfig, rng: np.random.Generator, resize: Resize = pil_resize) -> Pixels:
    """[H, W, 3] uint8 -> [H, W, 3] uint8: random resized crop, then colour jitter. Off: the very same array."""
    if _crops(cfg):
        height, width = pixels.shape[:2]
        top, left, rows, columns = crop_box(height, width, cfg, rng)
        if (rows, columns) != (height, width):
            pixels = resize(np.ascontiguousarray(pixels[top : top + rows, left : left + columns]), height, width)
    return _jitter(pixels, cfg, rng)


def crop_box(height: int, width: int, cfg: AugmentConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a crop with an area and a shape drawn from cfg's ranges, at least one pixel.

    Area uniform, shape uniform in its logarithm, as random resized crops are drawn everywhere; but the shape is drawn
    only from what fits into the image (a crop of the whole area has the image's shape), so nothing is tried again.
    """
    scale = rng.uniform(cfg.crop_scale[0], cfg.crop_scale[1])
    fits = -math.log(scale)
    low, high = (min(max(math.log(ratio), -fits), fits) for ratio in cfg.crop_ratio)
    ratio = math.exp(rng.uniform(low, high))
    rows = min(height, max(1, round(height * math.sqrt(scale / ratio))))
    columns = min(width, max(1, round(width * math.sqrt(scale * ratio))))
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns


def augment_messages(messages: Sequence[Message], cfg: AugmentConfig, rng: np.random.Generator) -> list[Message]:
    """Text dropout: a user's turn that shows images keeps them and loses its text, with cfg.text_dropout.

    What generators of images call caption dropout leaves out the text that is given, never what is to be predicted.
    Here the answers are predicted: they stay, with their loss. So does a turn without an image, of which nothing
    would be left, and the system's message, in whose place the template would put its own. It suits captions, which
    an image alone calls for; a question that is lost leaves an answer to be guessed.

    Whoever packs by lengths must take the messages as they were where a tokenizer makes more tokens of less text.
    """
    if not cfg.text_dropout:
        return list(messages)
    kept: list[Message] = []
    for message in messages:
        images = message["content"].count(IMAGE_MARKER) if message["role"] == "user" else 0
        if images and rng.random() < cfg.text_dropout:
            message = {"role": "user", "content": IMAGE_MARKER * images}
        kept.append(message)
    return kept


def _crops(cfg: AugmentConfig) -> bool:
    return list(cfg.crop_scale) != [1.0, 1.0]


def _strengths(cfg: AugmentConfig) -> dict[str, float]:
    return {
        "brightness": cfg.brightness,
        "contrast": cfg.contrast,
        "saturation": cfg.saturation,
        "hue": cfg.hue,
    }


def _jitter(pixels: Pixels, cfg: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter."""
    steps = [(name, strength) for name, strength in _strengths(cfg).items() if strength]
    if not steps:
        return pixels
    image = Image.fromarray(pixels)
    for i in rng.permutation(len(steps)):
        name, strength = steps[i]
        if name == "hue":
            image = _turn_hue(image, rng.uniform(-strength, strength))
        else:
            image = _ENHANCERS[name](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return np.array(image)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(round(turn * 256) % 256)  # wraps around at 256
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
