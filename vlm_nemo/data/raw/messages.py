"""The few ways in which raw texts become messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlm_nemo.data.sample import BAD_JSON, EMPTY_CAPTION, NO_LABEL, Message, SampleError
from vlm_nemo.types import IMAGE_MARKER


def caption_messages(text: str) -> list[Message]:
    """The user shows an image, the assistant says the caption. Raises SampleError ("empty caption")."""
    if not text.strip():
        raise SampleError(EMPTY_CAPTION, "no caption")
    return [{"role": "user", "content": IMAGE_MARKER}, {"role": "assistant", "content": text.strip()}]


def question_messages(question: str, answer: str, images: int, suffix: str = "") -> list[Message]:
    """A question about images; they are shown before it unless it says itself where they stand.

    ("Hue?", "red", 1) -> user "<image>\\nHue?", assistant "red"
    Raises SampleError if question or answer is empty.
    """
    if not question.strip() or not answer.strip():
        raise SampleError(NO_LABEL, "no answer" if question.strip() else "no question")
    if IMAGE_MARKER not in question:
        question = f"{IMAGE_MARKER}\n" * images + question
    return [{"role": "user", "content": question + suffix}, {"role": "assistant", "content": answer.strip()}]


def text_messages(text: str) -> list[Message]:
    """A text that is learned as it is: nobody asked for it. Markers in it stand for images.

    The assistant's turn is the whole text, so every token of it is supervised but the images' placeholders. With the
    template "plain" nothing is put around it.
    Raises SampleError ("no label") if it holds no text.
    """
    if not text.replace(IMAGE_MARKER, "").strip():
        raise SampleError(NO_LABEL, "no text")
    return [{"role": "user", "content": ""}, {"role": "assistant", "content": text.strip()}]


def pick_answer(answers: Any, weights: Any = None) -> str:
    """One answer of several: of the greatest weight, else the most frequent; the first of those that are equal.

    answers: a text, or a list of texts or of tables with `answer` (VQAv2's). Raises SampleError if there is none.
    """
    if isinstance(answers, (str, int, float)) and not isinstance(answers, bool):
        return str(answers)
    if not isinstance(answers, Sequence) or isinstance(answers, bytes):
        raise SampleError(NO_LABEL if answers is None else BAD_JSON, "no answer, or neither a text nor a list")
    votes: Counter[str] = Counter()
    for answer, weight in zip(answers, _weights(weights, len(answers)), strict=True):
        text = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise SampleError(BAD_JSON, "an answer is not a text")
        if text.strip():
            votes[text.strip()] += weight
    if not votes:
        raise SampleError(NO_LABEL, "no answer")
    return max(votes, key=votes.__getitem__)  # Counter keeps the order in which they came


def _weights(weights: Any, count: int) -> list[Any]:
    if weights is None:
        return [1] * count
    if not isinstance(weights, list) or len(weights) != count:
        raise SampleError(BAD_JSON, f"{count} answers, but not as many weights")
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise SampleError(BAD_JSON, "a weight is not a number")
    return weights
