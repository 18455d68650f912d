"""How the next token is chosen. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's wishes, in vLLM's words."""

    n: int = 1
    """Answers to one prompt; the i-th draws with seed + i."""
    temperature: float = 0.0
    """0 = greedy: the likeliest token every time. (vLLM's default is 1.)"""
    top_p: float = 1.0
    """Only the likeliest tokens that hold this share of the probability are drawn from."""
    top_k: int = 0
    """Only that many of the likeliest tokens are drawn from; 0 = all."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else runs; None = another answer every time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    max_tokens: int = 16
    """Longest answer, tokens."""
    logprobs: int | None = None
    """How many likeliest tokens to report with their log-probability beside the chosen one; None = no report."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer holds already."""
    frequency_penalty: float = 0.0
    """The same for every time that it does."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever is said: for measuring."""
