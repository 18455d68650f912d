"""The sampler against transformers' logits processors, and against the distribution that it should draw from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlm_nemo.infer.sampling import Sampler, SamplingParams, draw, penalise, probabilities, token_logprob
from vlm_nemo.types import UserError


def logits(seed: int, size: int = 50) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


def theirs(values: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    scores = torch.from_numpy(values.astype(np.float64))[None]
    warpers = [TemperatureLogitsWarper(float(params.temperature))]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
    return scores.softmax(-1)[0].numpy()


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0.05, 2),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
)
def test_filters_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = probabilities(logits(seed).astype(np.float64), params)
    assert (ours > 0).tolist() == (theirs(logits(seed), params) > 0).tolist()
    np.testing.assert_allclose(ours, theirs(logits(seed), params), rtol=1e-9, atol=1e-12)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20000 draws of one generator: 23 degrees of freedom stay below 49.7 but once in a thousand."""
    params = SamplingParams(temperature=1.3, top_k=24)
    sampler = Sampler(params, 7)
    said = Counter(sampler.choose(logits(3)) for _ in range(20_000))
    expected = theirs(logits(3), params) * 20_000
    kept = expected > 0
    assert kept.sum() == 24 and set(said) <= set(np.flatnonzero(kept).tolist())
    seen = np.array([said[i] for i in np.flatnonzero(kept).tolist()])
    assert ((seen - expected[kept]) ** 2 / expected[kept]).sum() < 49.7


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(), 0)
    assert sampler.choose(np.array([1, 5, 5, 2], np.float32)) == 1
    assert sampler.choose(np.array([1, 5, 5, 2], np.float32), banned=1) == 2
    for temperature in (1e-300, 1e-6):
        assert Sampler(SamplingParams(temperature=temperature, seed=1), 1).choose(logits(4)) == logits(4).argmax()


def test_among_equals() -> None:
    even = np.zeros(4)
    assert probabilities(even, SamplingParams(temperature=1, top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(even, SamplingParams(temperature=1, top_k=1)).tolist() == [0.25] * 4
    assert probabilities(np.array([0.0, 9]), SamplingParams(temperature=1, top_p=1e-9)).tolist() == [0, 1]


def test_the_same_seed_says_the_same_and_a_draw_uses_one_number() -> None:
    def said(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0), seed)
        return [sampler.choose(logits(i)) for i in range(40)]

    assert said(5) == said(5) != said(6)
    assert said(-1) == said((1 << 64) - 1), "a negative seed is a seed too"
    numbers = np.random.Generator(np.random.PCG64(5)).random(40)
    weights = [probabilities(logits(i).astype(np.float64), SamplingParams(temperature=1.0)) for i in range(40)]
    assert said(5) == [draw(w, n) for w, n in zip(weights, numbers, strict=True)]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=20).filter(any))
def test_what_has_no_weight_is_never_drawn(values: list[float]) -> None:
    weights = np.array(values) / sum(values)
    for number in (0.0, 0.5, np.nextafter(1, 0)):
        assert weights[draw(weights, float(number))] > 0


def test_penalties_are_of_what_was_said() -> None:
    scores = np.ones(5)
    penalise(scores, Counter({1: 1, 3: 4}), 0.5, 0.25)
    assert scores.tolist() == [1, 0.25, 1, -0.5, 1]
    sampler = Sampler(SamplingParams(frequency_penalty=1.0), 0)
    row = np.array([3, 2.5, 0, 0], np.float32)
    assert [sampler.choose(row) for _ in range(4)] == [0, 1, 0, 1], "3, 2.5 | 2, 2.5 | 2, 1.5 | 1, 1.5"
    sampler = Sampler(SamplingParams(presence_penalty=-2.0), 0)
    assert [sampler.choose(row), sampler.choose(np.array([3, 4.5, 0, 0], np.float32))] == [0, 0], "what was said stays"


def test_logprobs_are_log_softmax() -> None:
    values = logits(9)
    exact = torch.from_numpy(values).double().log_softmax(-1)
    got = token_logprob(values, 17, 5)
    best = exact.topk(5)
    assert (got.token_id, got.logprob) == (17, pytest.approx(exact[17].item(), abs=1e-12))
    assert [token for token, _ in got.top] == best.indices.tolist()
    assert [value for _, value in got.top] == pytest.approx(best.values.tolist(), abs=1e-12)
    assert token_logprob(values, 17, 0).top == () and len(token_logprob(values[:3], 1, 20).top) == 3
    assert token_logprob(np.array([1, 2, 2], np.float32), 0, 2).top[0][0] == 1


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"n": 0}, "n must be at least 1 and at most 16384, not 0"),
        ({"n": 1.0}, "n must be a whole number, not 1.0"),
        ({"n": True}, "n must be a whole number, not True"),
        ({"temperature": -1}, "temperature must be at least 0 and at most 2, not -1"),
        ({"temperature": 2.1}, "temperature .* not 2.1"),
        ({"temperature": float("nan")}, "temperature must be a number, not nan"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"logprobs": 21}, "logprobs must be at least 0 and at most 20, not 21"),
        ({"presence_penalty": 2.5}, "presence_penalty must be at least -2 and at most 2, not 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": "a"}, "seed must be a whole number, not 'a'"),
        ({"stop": ("a", "")}, "stop holds ''"),
        ({"stop": (3,)}, "stop holds 3"),
    ],
)
def test_a_wish_out_of_range_is_refused(wish: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SamplingParams(**wish).validate()


def test_wishes_at_the_ends_of_their_ranges() -> None:
    for wish in (
        {"temperature": 2, "top_p": 1e-9, "top_k": 10**6, "logprobs": 0, "seed": -(1 << 63)},
        {"logprobs": 20},
    ):
        SamplingParams(**wish).validate()  # type: ignore[arg-type]
    assert SamplingParams(stop="a").stop == ("a",) == SamplingParams(stop=["a"]).stop  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
