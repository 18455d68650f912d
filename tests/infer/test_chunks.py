"""Prompts in pieces, against what mtmd makes of the same prompts and against training's own encoding."""

from __future__ import annotations

import pytest

from tests.infer.fakes import SPEC
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.chunks import ImageChunk, TextChunk, chat_prompt, flatten, split_prompt, text_prompt
from vlm_nemo.types import UserError


def shape(tokenizer: Tokenizer, prompt: str, images: int) -> list[str]:
    """["<s>a", 0, "b"]: texts and image numbers."""
    made = []
    for chunk in split_prompt(prompt, images, tokenizer, SPEC):
        if isinstance(chunk, ImageChunk):
            assert chunk.length == SPEC.tokens
            made.append(f"[{chunk.index}]")
        else:
            bos = "<s>" if chunk.tokens[0] == tokenizer.bos_id else ""
            made.append(bos + tokenizer.decode(chunk.tokens))
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
    tokens = text_prompt(prompt, images, tokenizer, SPEC)
    assert tokens[0] == tokenizer.bos_id and tokens.count(tokenizer.bos_id) == 1
    assert tokens.count(tokenizer.image_id) == images * SPEC.tokens and tokenizer.eos_id not in tokens
    assert tokens == flatten(split_prompt(prompt, images, tokenizer, SPEC), tokenizer.image_id)


def test_each_text_is_tokenised_by_itself(tokenizer: Tokenizer) -> None:
    first, image, second = split_prompt("a red<image> circle", 1, tokenizer, SPEC)
    assert isinstance(first, TextChunk) and isinstance(second, TextChunk) and isinstance(image, ImageChunk)
    assert first.tokens == (tokenizer.bos_id, *tokenizer.encode("a red"))
    assert second.tokens == tuple(tokenizer.encode(" circle"))


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
        text_prompt("<image>" * markers + "a", images, tokenizer, SPEC)
    with pytest.raises(UserError, match=says):
        messages = [{"role": "user", "content": "<image>" * markers}]
        chat_prompt(messages, images, tokenizer, TEMPLATES["vicuna"], SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_the_beginning_of_what_was_trained_on(tokenizer: Tokenizer, template: str) -> None:
    messages = [
        {"role": "user", "content": "<image>\nwhat is this?"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "and <image>?"},
    ]
    prompt = chat_prompt(messages, 2, tokenizer, TEMPLATES[template], SPEC)  # type: ignore[arg-type]
    whole = [*messages, {"role": "assistant", "content": "blue"}]
    trained, labels = encode_conversation(whole, tokenizer, TEMPLATES[template], [SPEC.tokens] * 2)  # type: ignore[arg-type]
    assert trained[: len(prompt)] == prompt and labels[len(prompt)] == trained[len(prompt)]
    with pytest.raises(UserError, match="a prompt ends with the user's turn"):
        chat_prompt(messages[:2], 1, tokenizer, TEMPLATES[template], SPEC)  # type: ignore[arg-type]
