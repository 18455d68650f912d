"""What goes into the engine and what comes out of it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.sampling import TokenLogprob
from vlm_nemo.types import Images


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked."""

    tokens: Sequence[int]
    """Ids, every image as its placeholders."""
    images: Callable[[], Images[NDArray[Any]] | None] = lambda: None
    """Called once, when the request's turn comes; may raise UserError (SampleError) or OSError"""
    image_count: int = 0
    """Images that it will give."""
    positions: NDArray[np.int64] | None = None
    """[3, tokens]: where M-RoPE sees them, the answer going on behind the highest; None = one after the other"""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What one step did to one answer."""

    request: int
    index: int
    """Which of the request's answers, 0 to n - 1."""
    text: str = ""
    """New text, perhaps none; never half a character, never a part of a stop text."""
    token_ids: tuple[int, ...] = ()
    """New ids; eos is among them when the model says it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new id, where they were asked for."""
    finish_reason: str | None = None
    """None = it goes on | "stop" | "length" | "cancelled" | "error"."""
    stop_reason: str | None = None
    """The stop text, if one ended the answer."""
    error: str | None = None
    """With finish_reason "error": one line."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    """None where they were not asked for."""
    finish_reason: str
    stop_reason: str | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt."""

    prompt_token_ids: list[int]
    outputs: list[Answer]
    """n of them."""
    prompt: str | None = None
    """The text, where the prompt was one."""


def answer_of(events: Sequence[Event], with_logprobs: bool) -> Answer:
    """All events of one answer, in their order, as one."""
    last = events[-1]
    assert last.finish_reason is not None
    return Answer(
        text="".join(event.text for event in events),
        token_ids=[token for event in events for token in event.token_ids],
        logprobs=[each for event in events for each in event.logprobs] if with_logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
    )
