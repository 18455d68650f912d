"""Messages to tokens and labels. Pure: no files, no tensors.

A conversation is a row of pieces; only what the assistant says, and the eos that closes it, is supervised:

    piece    <s> | "A chat … USER: " | <image> x P | "\\nColour? ASSISTANT:" | " red" | </s>
    labels    .  |  .                |  .          |  .                     | " red" | </s>     (. = IGNORE_INDEX)

Every piece is tokenised by itself, so no token crosses from the prompt into the answer, and the prompt of generation
is the exact beginning of what was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.pieces import EncodedText, Writer, write_image, write_ours
from vlm_nemo.data.sample import BAD_JSON, Message, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.data.turns import check_images, check_roles, check_turns, count_markers
from vlm_nemo.types import IMAGE_MARKER


@dataclass(frozen=True, kw_only=True)
class Template:
    """How roles become text. Special tokens stand in it by name ("<|im_start|>user\\n"); in contents they never do."""

    system: str = ""
    """Text before the first turn; a message with role system takes its place."""
    system_start: str = ""
    system_end: str = ""
    preamble: str = ""
    """Put before the system's text where a conversation has no images, which then has a system block always
    (Llama 3.2)."""
    system_in_turn: bool = False
    """The system's text stands behind the first user_start (Gemma)."""
    user_start: str = ""
    user_lead: str = ""
    """Put before what a user says where it starts with words, not with an image."""
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
    images_first: bool = False
    """Images at the beginning of the first turn stand before everything, bos included (BLIP-2)."""


_CHATML = Template(
    system_start="<|im_start|>system\n",
    system_end="<|im_end|>\n",
    user_start="<|im_start|>user\n",
    user_end="<|im_end|>\n",
    assistant_start="<|im_start|>assistant\n",
    assistant_end="<|im_end|>",
    between="\n",
    bos=False,
)

_LLAMA3 = Template(
    system_start="<|start_header_id|>system<|end_header_id|>\n\n",
    system_end="<|eot_id|>",
    user_start="<|start_header_id|>user<|end_header_id|>\n\n",
    user_end="<|eot_id|>",
    assistant_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
    assistant_end="<|eot_id|>",
)

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
    # LLaVA-NeXT on Mistral: "[INST] <image>\nQuestion [/INST] Answer</s> [INST] …"
    "mistral": Template(
        system_start="<<SYS>>\n",
        system_end="\n<</SYS>>\n\n",
        user_start="[INST] ",
        user_end=" [/INST]",
        assistant_lead=" ",
        between=" ",
    ),
    # LLaVA-NeXT on Llama 3
    "llama3": _LLAMA3,
    # Llama 3.2 Vision; the day is the one that its own template says where nobody gives another
    "llama32": replace(_LLAMA3, preamble="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    # InternVL
    "chatml": _CHATML,
    # Qwen2-VL, Qwen2.5-VL, Ovis2
    "qwen": replace(_CHATML, system="You are a helpful assistant."),
    # LLaVA-OneVision: "<|im_start|>user <image>\nQuestion<|im_end|><|im_start|>assistant\n"
    "onevision": Template(
        system_start="<|im_start|>system \n",
        system_end="<|im_end|>",
        user_start="<|im_start|>user ",
        user_lead="\n",
        user_end="<|im_end|>",
        assistant_start="<|im_start|>assistant\n",
        assistant_end="<|im_end|>",
        bos=False,
    ),
    # Gemma 3
    "gemma": Template(
        system_end="\n\n",
        system_in_turn=True,
        user_start="<start_of_turn>user\n",
        user_end="<end_of_turn>\n",
        assistant_start="<start_of_turn>model\n",
        assistant_end="<end_of_turn>",
        between="\n",
    ),
    # Idefics3, SmolVLM: "User:<image>Question<end_of_utterance>\nAssistant: Answer<end_of_utterance>"
    "idefics3": Template(
        system_start="System: ",
        system_end="<end_of_utterance>\n",
        user_start="User:",
        user_lead=" ",
        user_end="<end_of_utterance>\n",
        assistant_start="Assistant:",
        assistant_lead=" ",
        assistant_end="<end_of_utterance>",
        between="\n",
    ),
    # BLIP-2: the image, then "Question: … Answer: …"
    "blip2": Template(
        system_end=" ",
        user_start="Question: ",
        user_end=" ",
        assistant_start="Answer:",
        assistant_lead=" ",
        images_first=True,
    ),
}


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
    check_roles(messages)
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


class _Piece(NamedTuple):
    """What lies between two answers, or an answer."""

    segments: list[tuple[str, bool]]
    """(text, whether it is ours: only there special tokens stand by name)"""
    supervised: bool


def _pieces(messages: Sequence[Message], template: Template) -> Iterator[_Piece]:
    system, ours = template.system, True
    if messages[0]["role"] == "system":
        system, messages, ours = messages[0]["content"], messages[1:], False
    preamble = "" if count_markers(messages) else template.preamble
    said = [(template.system_start, True), (preamble, True), (system, ours), (template.system_end, True)]
    said = said if preamble or system else []
    unspoken = [] if template.system_in_turn else said
    for i, message in enumerate(messages):
        if message["role"] == "user":
            unspoken.append((template.user_start, True))
            if i == 0 and template.system_in_turn:
                unspoken += said
            if not message["content"].startswith(IMAGE_MARKER):
                unspoken.append((template.user_lead, True))
            unspoken += [(message["content"], False), (template.user_end, True)]
        else:
            yield _Piece([*unspoken, (template.assistant_start, True)], False)
            yield _Piece([(template.assistant_lead, True), (message["content"].strip(), False)], True)
            unspoken = [(template.between, True)]
    if len(unspoken) > 1:
        yield _Piece(unspoken, False)


def _encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    images: Sequence[ImagePlan],
    *,
    prompt: bool = False,
) -> EncodedText:
    check_images(messages, len(images))
    writer, plans = Writer(tokenizer), iter(images)
    if template.images_first:
        leading, messages = _leading_images(messages)
        for _ in range(leading):
            write_image(writer, next(plans), tokenizer, False)
    if template.bos and tokenizer.bos_id is not None:
        writer.special(tokenizer.bos_id, False)
    pieces = list(_pieces(messages, template))
    if prompt:
        pieces.pop()  # the empty answer
    for segments, supervised in pieces:
        for segment, ours in segments:
            if ours:
                write_ours(writer, segment, tokenizer, supervised)
                continue
            for i, text in enumerate(segment.split(IMAGE_MARKER)):
                if i:
                    write_image(writer, next(plans), tokenizer, supervised)
                writer.text(text)
        writer.flush(supervised)
        if supervised:
            writer.special(end_id(tokenizer, template), True)
    return writer.done()


def _leading_images(messages: Sequence[Message]) -> tuple[int, list[Message]]:
    """How many images the first user's turn starts with, and the messages without them (and the line end behind)."""
    kept = list(messages)
    first = 1 if kept[0]["role"] == "system" else 0
    rest, count = kept[first]["content"], 0
    while rest.startswith(IMAGE_MARKER):
        rest, count = rest[len(IMAGE_MARKER) :].lstrip("\n"), count + 1
    kept[first] = {"role": kept[first]["role"], "content": rest}
    return count, kept
