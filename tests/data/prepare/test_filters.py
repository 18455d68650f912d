"""Filters of a source: what stays, what goes and why, and what a wrong one says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vlm_nemo.data.prepare.filters import count_words, first_refusal, read_filter
from vlm_nemo.data.sample import Message
from vlm_nemo.types import UserError


def say(text: str) -> list[Message]:
    return [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("rules", "sizes", "text", "facts", "detail"),
    [
        ({"min_side": 64}, [(64, 90)], "a cat", {}, None),
        ({"min_side": 64}, [(640, 480), (63, 90)], "a cat", {}, "side 63, wanted min_side=64"),
        ({"min_side": 64}, [], "text only", {}, None),
        ({"max_aspect": 2}, [(100, 200)], "a cat", {}, None),
        ({"max_aspect": 2}, [(100, 201)], "a cat", {}, "aspect 2.01, wanted max_aspect=2"),
        ({"min_words": 2, "max_words": 3}, [], "one two three", {}, None),
        ({"min_words": 2}, [], "one", {}, "words 1, wanted min_words=2"),
        ({"max_words": 3}, [], "one two three four", {}, "words 4, wanted max_words=3"),
        ({"min_similarity": 0.3}, [], "x", {"similarity": 0.3}, None),
        ({"min_similarity": 0.3}, [], "x", {"similarity": 0.29}, "similarity 0.29, wanted min_similarity=0.3"),
        ({"min_similarity": 0.3}, [], "x", {}, "similarity not stated, wanted min_similarity=0.3"),
        ({"max_punsafe": 0.5}, [], "x", {"punsafe": math.nan}, "punsafe nan, wanted max_punsafe=0.5"),
        ({"max_punsafe": 0.5}, [], "x", {"punsafe": "low"}, "punsafe low, wanted max_punsafe=0.5"),
        ({"language": ["en", "de"]}, [], "x", {"language": "de"}, None),
        ({"language": "en"}, [], "x", {"language": "fr"}, "language fr, wanted language=en"),
        ({"max_words_score": 1}, [], "one two", {"words_score": 0.5}, None),
        ({}, [(1, 1)], "", {}, None),
    ],
)
def test_what_stays_and_why_not(
    rules: dict[str, Any], sizes: list[tuple[int, int]], text: str, facts: dict[str, Any], detail: str | None
) -> None:
    found = first_refusal(read_filter(rules, "here"), say(text), sizes, facts)
    assert (found and found[1]) == detail


def test_words_of_scripts_without_spaces_are_counted() -> None:
    assert count_words(say("a cat, it's 3 years old")) == 7
    assert count_words(say("猫が好き cat")) == 5
    assert count_words(say("")) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"min_sides": 64}, r"f\.min_sides is unknown; did you mean min_side\?"),
        ({"min_side": "big"}, r"f\.min_side=big must be a number"),
        ({"max_words": True}, "must be a number"),
        ({"language": 3}, "must be a text or a list of texts; for numbers write min_language, max_language"),
        ({"language": []}, "must be a text"),
        ([1], "is not a table"),
    ],
)
def test_a_wrong_filter_says_what_to_change(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_filter(content, "f")
