"""Prompts as text and images that take turns, against training's own encoding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.fakes import PER_IMAGE, PLAN
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.prompts import chat_prompt, text_prompt
from vlm_nemo.types import UserError


def shape(tokenizer: Tokenizer, prompt: str, images: int) -> list[str]:
    """["<s>a", "[0]", "b"]: texts and image numbers."""
    text = text_prompt(prompt, [PLAN] * images, tokenizer)
    assert [text.tokens[slot] for slot in text.slots] == [tokenizer.image_id] * (images * PER_IMAGE)
    made, at = [], 0
    for number, block in enumerate([*text.slots.reshape(-1, PER_IMAGE), [len(text.tokens)]]):
        between = text.tokens[at : block[0]]
        if between:
            bos = "<s>" if between[0] == tokenizer.bos_id else ""
            made.append(bos + tokenizer.decode(between))
        if number < images:
            made.append(f"[{number}]")
            assert np.array_equal(text.sources[number * PER_IMAGE :][:PER_IMAGE], PER_IMAGE * number + np.arange(4))
        at = block[-1] + 1
    return made


@pytest.mark.parametrize(
    ("prompt", "images", "chunks"),
    [
        ("USER: <image>\ndescribe", 1, ["<s>USER: ", "[0]", "\ndescribe"]),
        ("<image><image>", 2, ["<s>", "[0]", "[1]"]),
        ("<image> a", 1, ["<s>", "[0]", " a"]),
        ("a <image>b<image>", 2, ["<s>a ", "[0]", "b", "[1]"]),
        ("no image", 0, ["<s>no image"]),
        ("", 0, ["<s>"]),
        ("</s><s> is text", 0, ["<s></s><s> is text"]),
        ("<image > <ima", 0, ["<s><image > <ima"]),
    ],
)
def test_text_and_images_take_turns(tokenizer: Tokenizer, prompt: str, images: int, chunks: list[str]) -> None:
    assert shape(tokenizer, prompt, images) == chunks
    tokens = text_prompt(prompt, [PLAN] * images, tokenizer).tokens
    assert tokens[0] == tokenizer.bos_id and tokens.count(tokenizer.bos_id) == 1
    assert tokens.count(tokenizer.image_id) == images * PER_IMAGE and tokenizer.eos_id not in tokens


def test_each_text_is_tokenised_by_itself(tokenizer: Tokenizer) -> None:
    tokens = text_prompt("a red<image> circle", [PLAN], tokenizer).tokens
    image = [tokenizer.image_id] * PER_IMAGE
    assert tokens == [tokenizer.bos_id, *tokenizer.encode("a red"), *image, *tokenizer.encode(" circle")]


@pytest.mark.parametrize(
    ("markers", "images", "says"),
    [
        (2, 1, r"Found more '<image>' placeholders in input prompt than actual .* \(placeholders: 2, images: 1\)"),
        (1, 0, r"Found more .* \(placeholders: 1, images: 0\)"),
        (1, 3, "Expected there to be 3 prompt placeholders corresponding to 3 image items, but instead found 1 prompt"),
        (0, 1, "Expected there to be 1 .* found 0 prompt placeholders!"),
    ],
)
def test_markers_and_images_must_be_equal(tokenizer: Tokenizer, markers: int, images: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        text_prompt("<image>" * markers + "a", [PLAN] * images, tokenizer)
    with pytest.raises(UserError, match=says):
        messages = [{"role": "user", "content": "<image>" * markers}]
        chat_prompt(messages, [PLAN] * images, tokenizer, TEMPLATES["vicuna"])  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["vicuna", "plain", "short", "mistral"])
def test_a_chat_is_the_beginning_of_what_was_trained_on(tokenizer: Tokenizer, template: str) -> None:
    messages = [
        {"role": "user", "content": "<image>\nwhat is this?"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "and <image>?"},
    ]
    prompt = chat_prompt(messages, [PLAN] * 2, tokenizer, TEMPLATES[template]).tokens  # type: ignore[arg-type]
    whole = [*messages, {"role": "assistant", "content": "blue"}]
    trained = encode_conversation(whole, tokenizer, TEMPLATES[template], [PLAN] * 2)  # type: ignore[arg-type]
    assert trained.tokens[: len(prompt)] == prompt and trained.labels[len(prompt)] == trained.tokens[len(prompt)]
    with pytest.raises(UserError, match="a prompt ends with the user's turn"):
        chat_prompt(messages[:2], [PLAN], tokenizer, TEMPLATES[template])  # type: ignore[arg-type]
