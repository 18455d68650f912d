"""How the next token is chosen: what one request may wish, and a pure function of logits. numpy, no torch here.

In this order, as vLLM does it:

    raw logits -> log-probabilities for the report
               -> penalties -> temperature -> top_k -> top_p -> one draw

The i-th answer owns one generator and uses one number of it a token, so an answer is a function of logits, wishes and
seed; nothing else that runs can change it.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.types import UserError

MAX_N = 16384
MAX_LOGPROBS = 20


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
    """Texts that end the answer; they are not part of it. One text or a list will do."""
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

    def __post_init__(self) -> None:
        stop = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))

    def validate(self) -> None:
        """Raises UserError, which names the value and its range."""
        _check_number("n", self.n, 1, MAX_N, whole=True)
        _check_number("temperature", self.temperature, 0, 2)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("top_k", self.top_k, 0, None, whole=True)
        _check_number("max_tokens", self.max_tokens, 1, None, whole=True)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.logprobs is not None:
            _check_number("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        if self.seed is not None:
            _check_number("seed", self.seed, -(1 << 63), (1 << 63) - 1, whole=True)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop holds {text!r}; each must be a text of one character or more")


def _check_number(
    name: str, value: object, low: int, high: int | None, *, whole: bool = False, above: bool = False
) -> None:
    """low <= value <= high (above: low < value); a whole number or any finite one."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise UserError(f"{name} must be {kind}, not {value!r}")
    if value < low or (above and value <= low) or (high is not None and value > high):
        start = f"above {low}" if above else f"at least {low}"
        end = "" if high is None else f" and at most {high}"
        raise UserError(f"{name} must be {start}{end}, not {value}")


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """What the model thought of one token that was chosen."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability, before penalties, temperature and filters."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first: as many as were asked for, whether or not the chosen one is among them"""


def fresh_entropy() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(63)


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(seed % (1 << 64)))
        self._said: Counter[int] = Counter()

    def choose(self, logits: NDArray[np.float32], banned: int | None = None) -> int:
        """The next token of raw logits [V], of which `banned` may not be it; the answer remembers it."""
        scores = logits.astype(np.float64)
        if banned is not None and banned < len(scores):
            scores[banned] = -np.inf
        penalise(scores, self._said, self.params.presence_penalty, self.params.frequency_penalty)
        if self.params.temperature == 0:
            token = int(scores.astype(np.float32).argmax())
        else:
            token = draw(probabilities(scores, self.params), self._random.random())
        self._said[token] += 1
        return token


def penalise(scores: NDArray[np.float64], said: Counter[int], presence: float, frequency: float) -> None:
    """Lower the logits [V] of what was said already, in place."""
    if said and (presence or frequency):
        ids = np.fromiter(said.keys(), np.int64, len(said))
        times = np.fromiter(said.values(), np.float64, len(said))
        scores[ids] -= presence + frequency * times


def probabilities(scores: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """What is drawn from, [V]: temperature above 0, then the top_k likeliest, then the likeliest that hold top_p.

    Tokens as likely as the top_k-th stay; among equals top_p keeps those of lower id. At least one token stays.
    """
    with np.errstate(over="ignore"):  # a tiny temperature: what is not the likeliest becomes -inf, and it shall
        scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < len(scores):
        least = np.partition(scores, len(scores) - params.top_k)[len(scores) - params.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    weights = np.exp(scores)
    weights /= weights.sum()
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        # Dropped: a token whose likelier ones alone already hold top_p
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= params.top_p]] = 0
        weights /= weights.sum()
    return weights


def draw(weights: NDArray[np.float64], number: float) -> int:
    """The token at `number`, 0 <= number < 1, of the line on which each token is as long as its weight."""
    ends = np.cumsum(weights)
    at = min(number * ends[-1], np.nextafter(ends[-1], 0))  # rounding must not reach the end of the line
    return int(np.searchsorted(ends, at, side="right"))


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """log_softmax of raw logits [V] at the chosen token and at the `top` likeliest; of equals the lower id first."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = np.argsort(-values, kind="stable")[:top].tolist() if top else []
    return TokenLogprob(token_id=token, logprob=float(values[token]), top=tuple((i, float(values[i])) for i in best))
