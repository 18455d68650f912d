"""Leave out what is not wanted: by image size, by number of words, by what the raw data says of a sample. Pure.

    filter: {min_side: 64, max_aspect: 3, min_words: 3, min_similarity: 0.28, max_punsafe: 0.5, language: [en, de]}

`min_NAME` and `max_NAME` compare a number that the raw data states, `NAME` a text; a sample that does not state it is
left out too, for nothing shows that it is wanted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_nemo.data.sample import Message
from vlm_nemo.types import IMAGE_MARKER, UserError

OWN = ("min_side", "max_aspect", "min_words", "max_words")
"""Measured here; every other name is a fact of the raw data."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""Chinese and Japanese put no spaces between words: each of their characters counts as one."""

Facts = Mapping[str, float | str]
"""What the raw data says of a sample: {"similarity": 0.31, "language": "en"}."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One condition. A number lies between `low` and `high`, a text is one of `words`."""

    name: str
    """The quantity: side, aspect, words, or the name of a fact."""
    text: str
    """As it stands in manifest.yaml, "min_side=64"; drops are counted by it."""
    fact: bool = False
    """Stated by the raw data, not measured here."""
    low: float | None = None
    high: float | None = None
    words: tuple[str, ...] | None = None

    def refuses(self, value: float | str | None) -> bool:
        if self.words is not None:
            return value not in self.words
        if not isinstance(value, (int, float)):
            return True
        # Written so that a NaN is refused
        return not ((self.low is None or value >= self.low) and (self.high is None or value <= self.high))


def read_filter(content: Any, where: str) -> tuple[Rule, ...]:
    """The rules of a source's `filter`. where: its place in manifest.yaml, for messages. Raises UserError."""
    if content is None:
        return ()
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a table such as {{min_side: 64, min_words: 3}}")
    return tuple(_rule(str(key), value, f"{where}.{key}") for key, value in content.items())


def _rule(key: str, value: Any, where: str) -> Rule:
    if key not in OWN and (near := difflib.get_close_matches(key, OWN, n=1, cutoff=0.85)):
        raise UserError(f"{where} is unknown; did you mean {near[0]}?")
    bound, _, name = key.partition("_")
    if bound in ("min", "max") and name:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}={value} must be a number")
        low, high = (float(value), None) if bound == "min" else (None, float(value))
        return Rule(name=name, text=f"{key}={value:g}", fact=key not in OWN, low=low, high=high)
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}={value} must be a text or a list of texts; for numbers write min_{key}, max_{key}")
    return Rule(name=key, text=f"{key}={'|'.join(words)}", fact=True, words=tuple(words))


def first_refusal(
    rules: Sequence[Rule], messages: Sequence[Message], sizes: Sequence[tuple[int, int]], facts: Facts
) -> tuple[Rule, str] | None:
    """The first rule that leaves the sample out, and what it found; None: the sample stays.

    sizes: (width, height) of each image; a sample without images passes min_side and max_aspect.
    """
    for rule in rules:
        value = facts.get(rule.name) if rule.fact else _measured(rule.name, messages, sizes)
        if value is None and not rule.fact:
            continue
        if rule.refuses(value):
            found = "not stated" if value is None else f"{value:g}" if isinstance(value, (int, float)) else value
            return rule, f"{rule.name} {found}, wanted {rule.text}"
    return None


def _measured(name: str, messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> float | str | None:
    if name == "words":
        return count_words(messages)
    if not sizes:
        return None
    if name == "side":
        return min(min(size) for size in sizes)
    return max(max(size) / max(1, min(size)) for size in sizes)


def count_words(messages: Sequence[Message]) -> int:
    """Words of a whole conversation, markers of images aside."""
    return sum(len(_WORD.findall(message["content"].replace(IMAGE_MARKER, " "))) for message in messages)
