"""A prompt's text and images to what the engine takes: ids now, pixels when its turn comes. No torch here.

    "USER: <image>\\nHue? ASSISTANT:"   ->  <s> USER:  placeholders of image 0  \\n Hue? ASSISTANT:
    "<image><image>"                   ->  <s>  placeholders of image 0  placeholders of image 1

Text and images take turns, as in llama.cpp's mtmd. Each text is tokenised by itself, and never becomes a special
token: those enter by their ids alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from vlm_nemo.data.chat import Template, encode_prompt
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.pieces import EncodedText
from vlm_nemo.data.sample import Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.data.turns import count_markers
from vlm_nemo.infer.request import Prompt
from vlm_nemo.types import IMAGE_MARKER, Images, UserError

BARE = Template()
"""No words but the prompt's own."""


def text_prompt(prompt: str, images: Sequence[ImagePlan], tokenizer: Tokenizer) -> EncodedText:
    """A prompt as it is, without any template, bos first; the i-th `<image>` becomes what images[i] says.

    Raises UserError with both counts where markers and images disagree.
    """
    return chat_prompt([{"role": "user", "content": prompt}], images, tokenizer, BARE)


def chat_prompt(
    messages: Sequence[Message], images: Sequence[ImagePlan], tokenizer: Tokenizer, template: Template
) -> EncodedText:
    """A conversation up to where the assistant starts to speak, as the model was trained on it.

    Raises UserError where markers and images disagree, with both counts, and where the roles do not take turns.
    """
    check_markers(count_markers(messages), len(images))
    return encode_prompt(messages, tokenizer, template, images)


def prompt_of(text: EncodedText, decode: Callable[[EncodedText], Images[NDArray[Any]]]) -> Prompt:
    """What the engine is asked. decode: the images that `text` has places for; called when the request's turn comes."""
    return Prompt(
        tokens=text.tokens,
        images=lambda: decode(text) if text.plans else None,
        image_count=len(text.plans),
        positions=text.positions,
    )


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
