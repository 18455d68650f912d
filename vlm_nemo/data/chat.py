"""Messages to tokens and labels. Pure: no files, no tensors.

A conversation is a row of pieces; only what the assistant says, and the eos that closes it, is supervised:

    piece    <s> | "A chat … USER: " | <image> x P | "\\nColour? ASSISTANT:" | " red" | </s>
    labels    .  |  .                |  .          |  .                     | " red" | </s>     (. = IGNORE_INDEX)

Every piece is tokenised by itself, so no token crosses from the prompt into the answer, and the prompt of generation
is the exact beginning of what was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlm_nemo.data.sample import (
    BAD_JSON,
    IMAGE_WITHOUT_MARKER,
    MARKER_WITHOUT_IMAGE,
    NO_LABEL,
    Message,
    SampleError,
)
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX, IMAGE_MARKER


@dataclass(frozen=True, kw_only=True)
class Template:
    """How roles become text. bos opens a conversation, eos closes each answer; neither is written here."""

    system: str = ""
    """Text before the first turn; a message with role system takes its place."""
    system_end: str = ""
    user_start: str = ""
    user_end: str = ""
    assistant_start: str = ""
    assistant_lead: str = ""
    """Put before each answer and supervised with it: the space that belongs to an answer's first word."""


TEMPLATES: dict[str, Template] = {
    # LLaVA-1.5: "A chat … USER: <image>\nQuestion ASSISTANT: Answer</s>USER: …"
    "vicuna": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        system_end=" ",
        user_start="USER: ",
        user_end=" ",
        assistant_start="ASSISTANT:",
        assistant_lead=" ",
    ),
    # LLaVA's first stage: image, caption
    "plain": Template(),
    # For tiny models: question, newline, answer
    "short": Template(user_end="\n"),
}


def encode_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Tokens and labels (not shifted) of a whole conversation.

    image_tokens: placeholders of each image, in order; the i-th `<image>` becomes image_tokens[i] of them.
    Raises SampleError if markers and images differ in number (with both numbers), if an answer is empty or there is
    none, or if the roles do not take turns.
    """
    check_turns(messages)
    return _encode(messages, tokenizer, template, image_tokens)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, image_tokens: Sequence[int]
) -> list[int]:
    """Tokens up to where the assistant starts to speak: the exact beginning of `encode_conversation`'s tokens.

    messages end with the user's turn. Raises SampleError as `encode_conversation` does.
    """
    _check_roles(messages)
    if messages[-1]["role"] != "user":
        raise SampleError(BAD_JSON, f"a prompt ends with the user's turn, this one with {messages[-1]['role']!r}")
    opened: list[Message] = [*messages, {"role": "assistant", "content": ""}]
    return _encode(opened, tokenizer, template, image_tokens, prompt=True)[0]


def count_markers(messages: Sequence[Message]) -> int:
    """Number of `<image>` in all turns."""
    return sum(message["content"].count(IMAGE_MARKER) for message in messages)


def check_images(messages: Sequence[Message], images: int) -> None:
    """Raises SampleError if the number of `<image>` differs from the number of images."""
    markers = count_markers(messages)
    if markers != images:
        reason = IMAGE_WITHOUT_MARKER if markers < images else MARKER_WITHOUT_IMAGE
        raise SampleError(reason, f"{markers} {IMAGE_MARKER} in the text, {images} images")


def check_turns(messages: Sequence[Message]) -> None:
    """Raises SampleError if the roles do not take turns, or an assistant turn is empty or there is none."""
    _check_roles(messages)
    # Images in an answer (of documents) are context like any other; an answer needs a word of its own
    answers = [m["content"].replace(IMAGE_MARKER, "") for m in messages if m["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise SampleError(NO_LABEL, "no assistant turn" if not answers else "an assistant turn is empty")


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if not turns or turns != expected[: len(turns)]:
        raise SampleError(BAD_JSON, f"turns must go user, assistant, user, …, not {', '.join(roles) or 'none'}")


def _pieces(messages: Sequence[Message], template: Template) -> Iterator[tuple[str, bool]]:
    """(text, supervised): all that lies between two answers is one piece."""
    system = template.system
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    unspoken = system + template.system_end if system else ""
    for message in messages:
        if message["role"] == "user":
            unspoken += template.user_start + message["content"] + template.user_end
        else:
            yield unspoken + template.assistant_start, False
            yield template.assistant_lead + message["content"].strip(), True
            unspoken = ""
    if unspoken:
        yield unspoken, False


def _encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    image_tokens: Sequence[int],
    *,
    prompt: bool = False,
) -> tuple[list[int], list[int]]:
    check_images(messages, len(image_tokens))
    tokens, labels = [tokenizer.bos_id], [IGNORE_INDEX]
    sizes = iter(image_tokens)
    pieces = list(_pieces(messages, template))
    if prompt:
        pieces.pop()  # the empty answer
    for piece, supervised in pieces:
        for i, text in enumerate(piece.split(IMAGE_MARKER)):
            if i:
                count = next(sizes)
                tokens += [tokenizer.image_id] * count
                labels += [IGNORE_INDEX] * count
            if text:
                ids = tokenizer.encode(text, continues=supervised and i == 0)
                tokens += ids
                labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        if supervised:
            tokens.append(tokenizer.eos_id)
            labels.append(tokenizer.eos_id)
    return tokens, labels
