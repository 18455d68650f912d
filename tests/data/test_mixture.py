"""The order: every record once an epoch, another order every epoch, shares as asked, a pure function."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_nemo.data.mixture import BLOCK, Mixture, _round_keys, permute
from vlm_nemo.types import UserError


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60)
def test_permute_is_a_permutation(n: int, seed: int) -> None:
    keys = _round_keys(seed, "a", 0)
    assert sorted(permute(i, n, keys) for i in range(n)) == list(range(n))


def test_permutations_look_random() -> None:
    n = 1000
    order = [permute(i, n, _round_keys(1, "a", 0)) for i in range(n)]
    fixed = sum(order[i] == i for i in range(n))
    rising = sum(order[i] < order[i + 1] for i in range(n - 1))
    assert fixed < 10 and 440 < rising < 560
    firsts = Counter(permute(0, 8, _round_keys(seed, "a", 0)) for seed in range(4000))
    assert all(350 < firsts[i] < 650 for i in range(8))


def test_every_epoch_has_every_record_once_in_another_order() -> None:
    mixture = Mixture({"a": 40}, {"a": 1.0}, seed=3, shuffle=True)
    epochs = [[mixture[e * 40 + i].record for i in range(40)] for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [mixture[e * 40 + 39].epoch for e in range(3)] == [0, 1, 2]
    again = Mixture({"a": 40}, {"a": 1.0}, seed=3, shuffle=True)
    assert [again[i].record for i in range(119, -1, -1)] == [mixture[i].record for i in range(119, -1, -1)]
    other = Mixture({"a": 40}, {"a": 1.0}, seed=4, shuffle=True)
    assert [other[i].record for i in range(40)] != epochs[0]


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_shares_follow_the_weights_everywhere(weights: list[float]) -> None:
    names = [f"s{i}" for i in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names, 7), dict(zip(names, weights, strict=True)), seed=0, shuffle=False)
    seen: Counter[str] = Counter()
    for position in range(2 * BLOCK):
        seen[mixture[position].source] += 1
        if position % 97 == 0:
            for name, weight in zip(names, weights, strict=True):
                # at most a few turns off the exact share, and never more than the rounding to a block allows
                assert abs(seen[name] - (position + 1) * weight / sum(weights)) <= len(weights) + 2 * len(weights)


def test_each_source_is_walked_without_gaps() -> None:
    mixture = Mixture({"a": 5, "b": 3}, {"a": 2.0, "b": 1.0}, seed=0, shuffle=False)
    places = [mixture[i] for i in range(3 * BLOCK)]
    for name, n in (("a", 5), ("b", 3)):
        own = [place for place in places if place.source == name]
        assert [(p.epoch, p.record) for p in own] == [divmod(i, n) for i in range(len(own))]


def test_weight_zero_leaves_a_source_out_and_nonsense_is_refused() -> None:
    mixture = Mixture({"a": 5, "b": 3}, {"a": 0.0, "b": 1.0}, seed=0, shuffle=True)
    assert {mixture[i].source for i in range(50)} == {"b"}
    with pytest.raises(UserError, match="weight above 0"):
        Mixture({"a": 5}, {"a": 0.0}, seed=0, shuffle=True)
    with pytest.raises(UserError, match=r"sources\.a\.weight=-1"):
        Mixture({"a": 5}, {"a": -1.0}, seed=0, shuffle=True)
