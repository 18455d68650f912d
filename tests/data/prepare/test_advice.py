"""Advice on the length of a row: the figures that were measured on models of the real mixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_nemo.data.prepare.advice import MAX_SAMPLES, TARGET, advise, pack_fill, percent

RNG = np.random.default_rng(0)
CC3M = RNG.integers(584, 601, 20000)
"""Captions: 576 placeholders and 8 to 24 tokens of text."""
INSTRUCT = np.where(RNG.random(20000) < 0.06, 0, 576) + np.exp(RNG.normal(5.3, 0.8, 20000)).astype(int).clip(10, 1400)
"""Instructions: most with one image, texts of very different lengths."""


def test_captions_cannot_fill_4096_but_4736() -> None:
    advice = advise(CC3M, 4096)
    assert 0.87 < advice.wanted.fill < 0.91 and advice.too_long == 0
    assert advice.lower is not None and advice.higher is not None
    assert (advice.lower.capacity, advice.higher.capacity) == (3584, 4736)
    assert advice.lower.fill >= 0.99 and advice.higher.fill >= 0.998
    assert advice.better == advice.lower
    assert str(advice).startswith("capacity 4096 fills to 8") and "; 3584 would fill to 99." in str(advice)
    assert str(advice).endswith(f", 4736 would fill to {percent(advice.higher.fill)}")


def test_an_instruction_mix_needs_no_advice() -> None:
    for capacity in (4096, 8192):
        advice = advise(INSTRUCT, capacity)
        assert advice.wanted.fill > 0.9999 and advice.better is None
    assert "would" not in str(advise(INSTRUCT, 4096))


def test_other_lengths_mixed_in_make_4096_fill() -> None:
    texts = RNG.integers(20, 400, 8000)
    assert advise(np.concatenate([CC3M, texts]), 4096).wanted.fill > 0.995


def test_too_long_ones_are_counted_and_make_no_difference_to_the_fill() -> None:
    advice = advise([*CC3M.tolist()[:2000], 5000, 6000, 7000], 4736)
    assert advice.too_long == 3 and advice.samples == 2003 and advice.wanted.fill > 0.999
    assert "3 of 2003 samples are longer than 4736" in str(advice)


def test_nothing_that_fits_is_said() -> None:
    advice = advise([700] * 10, 512)
    assert advice.wanted.fill == 0 and advice.too_long == 10
    assert advice.higher is not None and advice.higher.capacity == 768 or "longer than 512" in str(advice)
    with pytest.raises(ValueError, match="no lengths"):
        advise([-3, 0], 512)


def test_where_no_capacity_does_it_says_so() -> None:
    advice = advise([1000] * 50, 1024)
    assert advice.better is None and "mix in samples of other lengths" in str(advise([1000] * 50, 1500))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=40), st.integers(64, 2048))
def test_a_named_capacity_is_as_full_as_it_says(lengths: list[int], capacity: int) -> None:
    advice = advise(lengths, capacity)
    assert 0 <= advice.wanted.fill <= 1
    for found in (advice.lower, advice.higher):
        if found is not None:
            assert found.capacity % 128 == 0 and found.fill >= TARGET
            assert pack_fill(lengths, found.capacity) == found.fill
    if advice.lower is not None:
        assert max(n for n in [*lengths, 0] if n <= capacity or n == 0) <= advice.lower.capacity < capacity
    if advice.higher is not None:
        assert capacity < advice.higher.capacity <= 2 * capacity


def test_the_sample_speaks_for_all() -> None:
    few = pack_fill(CC3M[:MAX_SAMPLES], 4096)
    assert abs(few - pack_fill(CC3M, 4096)) < 0.005


def test_percent_does_not_round_up() -> None:
    assert percent(0.99998) == "99.99 %" and percent(1.0) == "100.00 %" and percent(0.9) == "90.00 %"
