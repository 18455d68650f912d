"""What is supervised, derived once more from the messages: by decoding labels, not by encoding pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.chat import Template, end_id
from vlm_nemo.data.layout.plan import NAME
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX, IMAGE_MARKER, Images

AT_A_TIME = 16
"""Samples that are packed together."""
_NONE = np.zeros(0, dtype=np.int64)
NO_IMAGES: Images[NDArray[Any]] = Images(
    patches=np.zeros((0, 3), dtype=np.uint8),
    grids=_NONE.reshape(0, 2),
    views=_NONE,
    embeddings=_NONE,
    slots=_NONE,
    sources=_NONE,
)
"""Of patches of one pixel."""


class Spoken(NamedTuple):
    """A sample in words and in tokens."""

    messages: Sequence[Message]
    sample: EncodedSample
    name: str


def label_faults(spoken: Sequence[Spoken], tokenizer: Tokenizer, template: Template) -> list[str]:
    """What is wrong with the labels that packing gives these samples, a line each; the first of every sample."""
    faults = []
    for start in range(0, len(spoken), AT_A_TIME):
        some = spoken[start : start + AT_A_TIME]
        # Packing then copies nothing large, and needs no images to be decoded
        samples = [replace(one.sample, images=NO_IMAGES) for one in some]
        length = sum(len(sample.tokens) for sample in samples) + 1
        row = pack_batch(samples, length, tokenizer.pad_id, patch=1)
        tokens, labels = row.tokens.tolist(), row.labels.tolist()
        edges = row.cu_seqlens.tolist()
        for one, first, end in zip(some, edges, edges[1:], strict=False):
            fault = _fault(one, tokens[first:end], labels[first:end], tokenizer, template)
            if fault:
                faults.append(f"{one.name}: {fault}")
        if any(label != IGNORE_INDEX for label in labels[row.used_tokens :]):
            faults.append("padding is supervised")
    return faults


def _fault(
    one: Spoken, tokens: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer, template: Template
) -> str | None:
    """Of one sample's tokens and labels as they lie in the row."""
    stop = end_id(tokenizer, template)
    supervised = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
    for t in supervised:
        if t + 1 == len(tokens):
            return "its last token is to predict what is not its own"
        if labels[t] != tokens[t + 1]:
            return f"label {t} is {_name(labels[t], tokenizer)}, the token behind it {_name(tokens[t + 1], tokenizer)}"
        if labels[t] in tokenizer.special_ids and labels[t] != stop:
            return f"label {t} is the special token {_name(labels[t], tokenizer)}"
    answers = [m["content"] for m in one.messages if m["role"] == "assistant"]
    said: list[list[int]] = [[]]
    for t in supervised:
        if labels[t] == stop:
            said.append([])
        else:
            said[-1].append(labels[t])
    if said.pop():
        return "its last answer is not closed"
    if len(said) != len(answers):
        return f"{len(said)} answers are supervised, it has {len(answers)}"
    for number, (ids, answer) in enumerate(zip(said, answers, strict=True), 1):
        # Through the tokenizer too, which may not give back every space
        lead = "".join(NAME.split(template.assistant_lead))
        parts = [
            tokenizer.decode(tokenizer.encode(part)) for part in (lead + answer.strip()).split(IMAGE_MARKER) if part
        ]
        if _letters(tokenizer.decode(ids)) != _letters("".join(parts)):
            return f"answer {number} is supervised as {tokenizer.decode(ids)[:60]!r}, it is {answer[:60]!r}"
    return None


def _letters(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def _name(token: int, tokenizer: Tokenizer) -> str:
    return f"{token} {tokenizer.decode([token])!r}"
