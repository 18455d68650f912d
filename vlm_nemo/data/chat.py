"""Messages to tokens and labels. Pure: no files, no tensors.

A conversation is a row of pieces; only what the assistant says, and the eos that closes it, is supervised:

    piece    <s> | "A chat … USER: " | <image> x P | "\\nColour? ASSISTANT:" | " red" | </s>
    labels    .  |  .                |  .          |  .                     | " red" | </s>     (. = IGNORE_INDEX)

Every piece is tokenised by itself, so no token crosses from the prompt into the answer, and the prompt of generation
is the exact beginning of what was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.plan import ImagePlan, Ints, offset
from vlm_nemo.data.pieces import encode_trusted
from vlm_nemo.data.positions import grid_positions
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
    """How roles become text. Special tokens stand in it by name ("<|im_start|>user\\n"); in contents they never do."""

    system: str = ""
    """Text before the first turn; a message with role system takes its place."""
    system_start: str = ""
    system_end: str = ""
    user_start: str = ""
    user_end: str = ""
    assistant_start: str = ""
    assistant_lead: str = ""
    """Put before each answer and supervised with it: the space that belongs to an answer's first word."""
    assistant_end: str = ""
    """The special token that closes an answer, supervised too; "" = the tokenizer's eos."""
    between: str = ""
    """Behind that token where another turn follows."""
    bos: bool = True
    """Whether the tokenizer's bos, if it has one, opens a conversation."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedText:
    """A conversation, or a prompt, as ids; what its images need before it can be decoded is in `plans`."""

    tokens: list[int]
    labels: list[int]
    """Not shifted: labels[t] is tokens[t] or IGNORE_INDEX."""
    plans: tuple[ImagePlan, ...]
    slots: Ints
    """See `vlm_nemo.types.Images`."""
    sources: Ints
    positions: Ints | None
    """[3, T] where M-RoPE counts an image's rows and columns; None = 0, 1, 2, … three times."""


def encode_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, images: Sequence[ImagePlan]
) -> EncodedText:
    """Tokens and labels (not shifted) of a whole conversation; the i-th `<image>` becomes what images[i] says.

    Raises SampleError if markers and images differ in number (with both numbers), if an answer is empty or there is
    none, or if the roles do not take turns.
    """
    check_turns(messages)
    return _encode(messages, tokenizer, template, images)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, images: Sequence[ImagePlan]
) -> EncodedText:
    """Tokens up to where the assistant starts to speak: the exact beginning of `encode_conversation`'s tokens.

    messages end with the user's turn. Raises SampleError as `encode_conversation` does.
    """
    _check_roles(messages)
    if messages[-1]["role"] != "user":
        raise SampleError(BAD_JSON, f"a prompt ends with the user's turn, this one with {messages[-1]['role']!r}")
    opened: list[Message] = [*messages, {"role": "assistant", "content": ""}]
    return _encode(opened, tokenizer, template, images, prompt=True)


def end_id(tokenizer: Tokenizer, template: Template) -> int:
    """The token that closes an answer: where generation stops."""
    return tokenizer.special(template.assistant_end) if template.assistant_end else tokenizer.eos_id


def check_names(template: Template, layout: LayoutConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer lacks a special token of the template, or of the text around images."""
    for text in (*asdict(template).values(), layout.before, layout.after):
        if isinstance(text, str) and text:
            tokenizer.split(text)
    end_id(tokenizer, template)


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


class _Piece(NamedTuple):
    """What lies between two answers, or an answer."""

    segments: list[tuple[str, bool]]
    """(text, whether it is ours: only there special tokens stand by name)"""
    supervised: bool


def _pieces(messages: Sequence[Message], template: Template) -> Iterator[_Piece]:
    system = template.system
    ours = True
    if messages[0]["role"] == "system":
        system, messages, ours = messages[0]["content"], messages[1:], False
    unspoken: list[tuple[str, bool]] = []
    if system:
        unspoken += [(template.system_start, True), (system, ours), (template.system_end, True)]
    for message in messages:
        if message["role"] == "user":
            unspoken += [(template.user_start, True), (message["content"], False), (template.user_end, True)]
        else:
            yield _Piece([*unspoken, (template.assistant_start, True)], False)
            yield _Piece([(template.assistant_lead, True), (message["content"].strip(), False)], True)
            unspoken = [(template.between, True)]
    if len(unspoken) > 1:
        yield _Piece(unspoken, False)


class _Writer:
    """Puts tokens, labels, places and positions side by side."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self._slots: list[Ints] = []
        self._sources: list[Ints] = []
        self._plans: list[ImagePlan] = []
        self._spans: list[tuple[int, int, int]] = []
        self._text = ""
        self._follows_text = False

    def text(self, text: str) -> None:
        """Held back until something else comes, so that neighbours are tokenised as one."""
        self._text += text

    def special(self, token: int, supervised: bool) -> None:
        self._put([token], supervised)
        self._follows_text = False

    def flush(self, supervised: bool) -> None:
        """Tokenise what was held back."""
        if self._text:
            ids = self._tokenizer.encode(self._text, continues=supervised and self._follows_text)
            self._put(ids, supervised)
            self._text, self._follows_text = "", True

    def image(self, plan: ImagePlan) -> None:
        """What stands for an image, without the text before and after it. Never supervised."""
        start = len(self.tokens)
        if plan.cross:
            self._slots.append(np.array([start]))
            self._put([self._tokenizer.image_id], False)
        for item in plan.items:
            if isinstance(item, str):
                self._put(encode_trusted(item, self._tokenizer), False)
                continue
            at, count = len(self.tokens), len(item.sources)
            token = self._tokenizer.special(item.token) if item.token else self._tokenizer.image_id
            self._put([token] * count, False)
            self._slots.append(np.arange(at, at + count))
        self._sources.append(plan.sources)
        if plan.span is not None:
            self._spans.append((start, *plan.span))
        self._plans.append(plan)
        self._follows_text = False

    def done(self) -> EncodedText:
        none = np.zeros(0, dtype=np.int64)
        return EncodedText(
            tokens=self.tokens,
            labels=self.labels,
            plans=tuple(self._plans),
            slots=np.concatenate([none, *self._slots]),
            sources=offset(self._sources, [plan.embeddings for plan in self._plans]),
            positions=grid_positions(len(self.tokens), self._spans) if self._spans else None,
        )

    def _put(self, ids: list[int], supervised: bool) -> None:
        self.tokens += ids
        self.labels += ids if supervised else [IGNORE_INDEX] * len(ids)


def _encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    images: Sequence[ImagePlan],
    *,
    prompt: bool = False,
) -> EncodedText:
    check_images(messages, len(images))
    writer, plans = _Writer(tokenizer), iter(images)
    if template.bos and tokenizer.bos_id is not None:
        writer.special(tokenizer.bos_id, False)
    pieces = list(_pieces(messages, template))
    if prompt:
        pieces.pop()  # the empty answer
    for segments, supervised in pieces:
        for segment, ours in segments:
            if ours:
                _write_ours(writer, segment, tokenizer, supervised)
                continue
            for i, text in enumerate(segment.split(IMAGE_MARKER)):
                if i:
                    plan = next(plans)
                    _write_ours(writer, plan.before, tokenizer, supervised)
                    writer.flush(supervised)
                    writer.image(plan)
                    _write_ours(writer, plan.after, tokenizer, supervised)
                writer.text(text)
        writer.flush(supervised)
        if supervised:
            writer.special(end_id(tokenizer, template), True)
    return writer.done()


def _write_ours(writer: _Writer, text: str, tokenizer: Tokenizer, supervised: bool) -> None:
    for piece in tokenizer.split(text) if text else ():
        if isinstance(piece, str):
            writer.text(piece)
        else:
            writer.flush(supervised)
            writer.special(piece, False)
