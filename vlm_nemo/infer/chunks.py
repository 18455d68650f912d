"""A prompt's text, split where its images stand, as llama.cpp's mtmd does it. Pure: no pixels here.

    "USER: <image>\\nHue? ASSISTANT:"   ->  [text <s> USER:] [image 0] [text \\n Hue? ASSISTANT:]
    "<image><image>"                   ->  [text <s>] [image 0] [image 1]

Each text is tokenised by itself, and never becomes a special token: those enter by their ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_nemo.data.chat import Template, count_markers, encode_prompt
from vlm_nemo.data.layout import ImageSpec
from vlm_nemo.data.sample import Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IMAGE_MARKER, UserError


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """Text between two images."""

    tokens: tuple[int, ...]
    """At least one; the first chunk starts with bos."""


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """One image."""

    index: int
    """Which one, in order."""
    length: int
    """Its placeholders, tokens."""


Chunk = TextChunk | ImageChunk


def split_prompt(prompt: str, images: int, tokenizer: Tokenizer, spec: ImageSpec) -> list[Chunk]:
    """Chunks of a prompt with an `<image>` for each image, bos first.

    Raises UserError with both counts where markers and images disagree.
    """
    parts = prompt.split(IMAGE_MARKER)
    check_markers(len(parts) - 1, images)
    chunks: list[Chunk] = []
    text = [tokenizer.bos_id]
    for index, part in enumerate(parts):
        if index:
            chunks.append(ImageChunk(index=index - 1, length=spec.tokens))
            text = []
        if part:
            text += tokenizer.encode(part)
        if text:
            chunks.append(TextChunk(tokens=tuple(text)))
    return chunks


def flatten(chunks: Sequence[Chunk], image_id: int) -> list[int]:
    """One row of ids: each image as its placeholders."""
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.tokens if isinstance(chunk, TextChunk) else [image_id] * chunk.length
    return tokens


def text_prompt(prompt: str, images: int, tokenizer: Tokenizer, spec: ImageSpec) -> list[int]:
    """Ids of a prompt as it is, without any template. Raises UserError as `split_prompt` does."""
    return flatten(split_prompt(prompt, images, tokenizer, spec), tokenizer.image_id)


def chat_prompt(
    messages: Sequence[Message], images: int, tokenizer: Tokenizer, template: Template, spec: ImageSpec
) -> list[int]:
    """Ids of a conversation up to where the assistant starts to speak, as the model was trained on it.

    Raises UserError where markers and images disagree, with both counts, and where the roles do not take turns.
    """
    check_markers(count_markers(messages), images)
    return encode_prompt(messages, tokenizer, template, [spec.tokens] * images)


def check_markers(markers: int, images: int) -> None:
    """Raises UserError where a prompt's markers are not as many as its images; the words begin as vLLM's do."""
    if markers > images:
        raise UserError(
            f"Found more '{IMAGE_MARKER}' placeholders in input prompt than actual multimodal data items. "
            f"(placeholders: {markers}, images: {images})"
        )
    if markers < images:
        raise UserError(
            f"Expected there to be {images} prompt placeholders corresponding to {images} image items, but instead "
            f"found {markers} prompt placeholders! Write {IMAGE_MARKER} into the prompt once for each image."
        )
