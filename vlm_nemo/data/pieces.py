"""Texts, special tokens and images put side by side as ids, labels and places. Pure.

In texts of ours (templates, layouts) special tokens stand by name; in what a user wrote they are unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_nemo.data.layout.plan import ImagePlan, Ints, Shares, Sources, offset
from vlm_nemo.data.positions import grid_positions
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX


def encode_trusted(text: str, tokenizer: Tokenizer) -> list[int]:
    """ "<row_1_col_2>\\n" -> ids, the special token's first. Raises UserError for one that the tokenizer lacks."""
    ids: list[int] = []
    for piece in tokenizer.split(text):
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece)
    return ids


def image_tokens(plan: ImagePlan, tokenizer: Tokenizer) -> int:
    """Tokens that stand for an image; `before` and `after` belong to the text."""
    if plan.cross:
        return 1
    return sum(
        len(encode_trusted(item, tokenizer)) if isinstance(item, str) else len(item.sources) for item in plan.items
    )


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
    shares: Shares | None
    positions: Ints | None
    """[3, T] where M-RoPE counts an image's rows and columns; None = 0, 1, 2, … three times."""


class Writer:
    """Puts tokens, labels, places and positions side by side."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self._slots: list[Ints] = []
        self._sources: list[Sources] = []
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
        sources, shares = offset(self._sources, [plan.embeddings for plan in self._plans])
        return EncodedText(
            tokens=self.tokens,
            labels=self.labels,
            plans=tuple(self._plans),
            slots=np.concatenate([none, *self._slots]),
            sources=sources,
            shares=shares,
            positions=grid_positions(len(self.tokens), self._spans) if self._spans else None,
        )

    def _put(self, ids: list[int], supervised: bool) -> None:
        self.tokens += ids
        self.labels += ids if supervised else [IGNORE_INDEX] * len(ids)


def write_image(writer: Writer, plan: ImagePlan, tokenizer: Tokenizer, supervised: bool) -> None:
    """An image with the text before and behind it, which joins its neighbours."""
    write_ours(writer, plan.before, tokenizer, supervised)
    writer.flush(supervised)
    writer.image(plan)
    write_ours(writer, plan.after, tokenizer, supervised)


def write_ours(writer: Writer, text: str, tokenizer: Tokenizer, supervised: bool) -> None:
    for piece in tokenizer.split(text) if text else ():
        if isinstance(piece, str):
            writer.text(piece)
        else:
            writer.flush(supervised)
            writer.special(piece, False)
