"""Augmentation: nothing unless asked for, the same for the same sample, and never longer than what the plan counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.raw_data import picture, pixels_of
from vlm_nemo.data.augment import (
    augment_image,
    augment_messages,
    changes_images,
    check_augment,
    crop_box,
    sample_rng,
)
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.config import AugmentConfig, LayoutConfig
from vlm_nemo.data.image import decode_image, decode_images, decode_pixels
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

OFF = AugmentConfig()
ALL = AugmentConfig(
    crop_scale=[0.3, 1.0],
    crop_ratio=[0.75, 4 / 3],
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    text_dropout=0.5,
)
PIXELS = decode_pixels(picture(1, (90, 60)))
CAPTION: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look: <image> and <image>. What is it?"},
    {"role": "assistant", "content": "two red circles"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes, <b>red</b>"},
]


def rng(record: int = 0) -> np.random.Generator:
    return sample_rng(5, "captions", 0, record)


def test_off_is_the_very_same() -> None:
    assert augment_image(PIXELS, OFF, rng()) is PIXELS
    assert augment_messages(CAPTION, OFF, rng()) == CAPTION
    assert not changes_images(OFF) and not changes_images(AugmentConfig(text_dropout=1.0))
    assert changes_images(AugmentConfig(hue=0.1)) and changes_images(AugmentConfig(crop_scale=[0.5, 1.0]))


def test_a_sample_is_changed_the_same_way_every_time() -> None:
    once, again = (augment_image(PIXELS, ALL, rng(7)) for _ in range(2))
    assert np.array_equal(once, again)
    others = (rng(8), sample_rng(5, "captions", 1, 7), sample_rng(6, "captions", 0, 7), sample_rng(5, "web", 0, 7))
    for other in others:
        assert not np.array_equal(once, augment_image(PIXELS, ALL, other))


def test_names_and_numbers_do_not_run_together() -> None:
    draws = {sample_rng(*who).integers(1 << 62) for who in ((1, "2/3", 4, 5), (1, "3", 2, 5), (1, "5/2", 4, 3))}
    assert len(draws) == 3


def test_the_generator_never_changes() -> None:
    # Resuming a run must draw the same numbers as the version that began it
    assert sample_rng(1234, "captions", 2, 345).integers(1 << 32, size=3).tolist() == [
        1814596922,
        3384536397,
        1680508203,
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (8, 1600), (3, 2), (64, 64)])
@pytest.mark.parametrize("resize", [None, torch_resize])
def test_shape_and_type_stay(shape: tuple[int, int], resize: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before = pixels.copy()
    for record in range(20):
        given_resize = {"resize": resize} if resize else {}
        found = augment_image(pixels, ALL, rng(record), **given_resize)
        assert found.shape == pixels.shape and found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(pixels, before), "the input is not written to"


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    record=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_a_crop_lies_inside(height: int, width: int, scale: list[float], ratio: list[float], record: int) -> None:
    assume(scale[0] < 1)
    cfg = AugmentConfig(crop_scale=scale, crop_ratio=ratio)
    check_augment(cfg)
    top, left, rows, columns = crop_box(height, width, cfg, rng(record))
    assert 0 <= top <= top + rows <= height and 0 <= left <= left + columns <= width and rows and columns
    if rows > 20 and columns > 20:
        assert scale[0] * 0.94 < rows * columns / (height * width) < scale[1] * 1.06 + 1e-9


def test_crops_are_spread_over_area_shape_and_place() -> None:
    cfg = AugmentConfig(crop_scale=[0.2, 0.6], crop_ratio=[0.75, 4 / 3])
    boxes = np.array([crop_box(600, 900, cfg, rng(i)) for i in range(4000)], dtype=float)
    area = boxes[:, 2] * boxes[:, 3] / (600 * 900)
    shape = np.log(boxes[:, 3] / boxes[:, 2] / 1.5)
    assert abs(area.mean() - 0.4) < 0.01 and abs(area.std() - 0.4 / 12**0.5) < 0.01
    assert abs(shape.mean()) < 0.01 and abs(shape.max() - np.log(4 / 3)) < 0.02
    for start, extent, whole in ((0, 2, 600), (1, 3, 900)):
        place = boxes[:, start] / (whole - boxes[:, extent])
        assert abs(place.mean() - 0.5) < 0.02 and place.min() < 0.01 and place.max() > 0.99


def test_a_crop_shows_a_part_at_the_images_size() -> None:
    cfg = AugmentConfig(crop_scale=[0.25, 0.25])
    top, left, rows, columns = crop_box(60, 90, cfg, rng(3))
    assert (rows, columns) == (30, 45)
    part = Image.fromarray(PIXELS[top : top + rows, left : left + columns])
    expected = np.asarray(part.resize((90, 60), Image.Resampling.BICUBIC))
    assert np.array_equal(augment_image(PIXELS, cfg, rng(3)), expected)
    fast = augment_image(PIXELS, cfg, rng(3), torch_resize)
    assert np.abs(fast.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_changes_what_it_names(name: str) -> None:
    cfg = replace(OFF, **{name: 0.3})

    def measure(pixels: np.ndarray) -> tuple[float, float, float, float]:
        hue, saturation, _ = np.asarray(Image.fromarray(pixels).convert("HSV"), dtype=float).reshape(-1, 3).T
        grey = pixels.mean(axis=2)
        return grey.mean(), grey.std(), saturation.mean(), np.exp(2j * np.pi * hue.mean() / 256).real

    smooth = (128 + (PIXELS.astype(int) - 128) // 3).astype(np.uint8)  # away from 0 and 255, where values are cut
    changed = [measure(augment_image(smooth, cfg, rng(i))) for i in range(400)]
    brightness, contrast, saturation, _ = np.array(changed).T / np.array(measure(smooth))[:, None]
    if name == "brightness":
        assert 0.69 < brightness.min() < 0.72 and 1.28 < brightness.max() < 1.31 and abs(brightness.mean() - 1) < 0.02
    elif name == "contrast":
        assert 0.68 < contrast.min() < 0.72 and 1.27 < contrast.max() < 1.32 and np.abs(brightness - 1).max() < 0.05
    elif name == "saturation":
        assert 0.65 < saturation.min() < 0.75 and 1.25 < saturation.max() < 1.35
        assert np.abs(contrast - 1).max() < 0.3
    else:
        turned = {
            augment_image(np.full((2, 2, 3), (200, 50, 50), np.uint8), cfg, rng(i))[0, 0].argmax() for i in range(60)
        }
        assert turned == {0, 1, 2}, "a red may become a green or a blue within 0.3 of the circle"
        assert 0.9 < brightness.min() and brightness.max() < 1.1


SHOWN: list[Message] = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "red"}]


def test_pixels_are_changed_before_the_image_is_made_square(tokenizer: Tokenizer) -> None:
    spec = image_spec(LayoutConfig(), size=48, patch=16)
    data = picture(2, (90, 30))
    changed, plan = decode_image(
        data, spec, augment=lambda pixels: augment_image(pixels, AugmentConfig(brightness=0.9), rng(1))
    )
    dark, bright = (pixels_of(patches, (3, 3)) for patches in (changed, decode_image(data, spec)[0]))
    assert not np.array_equal(dark[24], bright[24]) and np.array_equal(dark[0], bright[0]), "padding stays"
    # One generator for all images of a sample: each is changed in its own way
    shared = rng(1)
    text = encode_conversation(SHOWN, tokenizer, TEMPLATES["plain"], [plan, plan])
    both = decode_images([data, data], text, spec, augment=lambda pixels: augment_image(pixels, ALL, shared)).patches
    assert both.shape == (18, 16 * 16 * 3) and not np.array_equal(both[:9], both[9:])


def test_text_dropout_keeps_images_and_answers() -> None:
    cfg = AugmentConfig(text_dropout=1.0)
    found = augment_messages(CAPTION, cfg, rng())
    assert found[1] == {"role": "user", "content": "<image><image>"}
    assert [found[i] for i in (0, 2, 3, 4)] == [CAPTION[i] for i in (0, 2, 3, 4)]
    assert CAPTION[1]["content"].startswith("Look"), "the record is not written to"


def test_text_dropout_drops_as_often_as_it_says() -> None:
    cfg = AugmentConfig(text_dropout=0.3)
    dropped = sum(augment_messages(CAPTION, cfg, rng(i)) != CAPTION for i in range(4000))
    assert 0.27 < dropped / 4000 < 0.33


@given(
    words=st.lists(st.sampled_from(["red", " circle", "<image>", "\n", "?", "What", " ", "é", "12"]), max_size=12),
    template=st.sampled_from(sorted(TEMPLATES)),
)
@settings(deadline=None, max_examples=200)
def test_text_dropout_never_needs_more_room(rich: Tokenizer, words: list[str], template: str) -> None:
    text, tokenizer = "".join(words), rich
    messages: list[Message] = [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}]
    images = [plain(4)] * text.count("<image>")
    dropped = augment_messages(messages, AugmentConfig(text_dropout=1.0), rng())
    before = encode_conversation(messages, tokenizer, TEMPLATES[template], images)
    after = encode_conversation(dropped, tokenizer, TEMPLATES[template], images)
    assert len(after.tokens) <= len(before.tokens)
    supervised = [label for label in before.labels if label != -100]
    assert [label for label in after.labels if label != -100] == supervised, "every label keeps its place in the loss"
    assert after.tokens.count(tokenizer.image_id) == before.tokens.count(tokenizer.image_id)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop_scale": [0.5]}, r"data.augment.crop_scale=\[0.5\] must be \[lowest, highest\]"),
        ({"crop_scale": [0.0, 1.0]}, "above 0 and at most 1"),
        ({"crop_scale": [0.9, 0.5]}, "crop_scale"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale"),
        ({"crop_ratio": [0.0, 1.0], "crop_scale": [0.5, 1.0]}, "crop_ratio"),
        ({"crop_ratio": [0.75, 1.33]}, "does nothing to a crop of the whole area"),
        ({"brightness": -0.1}, "data.augment.brightness=-0.1 must be 0 to"),
        ({"contrast": float("nan")}, "contrast=nan"),
        ({"saturation": float("inf")}, "saturation=inf"),
        ({"hue": 0.6}, "hue=0.6 must be 0 to 0.5"),
        ({"text_dropout": 1.1}, "text_dropout=1.1 is a probability"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    check_augment(ALL)
    check_augment(OFF)
    with pytest.raises(UserError, match=says):
        check_augment(replace(OFF, **changes))
