"""The order: every record once an epoch, another order every epoch, shares as asked, a pure function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_nemo.data.config import SourceConfig
from vlm_nemo.data.mixture import BLOCK, Mixture, _round_keys, build_mixture, drawn, permute
from vlm_nemo.types import UserError


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60)
def test_permute_is_a_permutation(n: int, seed: int) -> None:
    keys = _round_keys(seed, "a", 0)
    assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))


def test_permutations_look_random() -> None:
    n = 1000
    order = permute(np.arange(n), n, _round_keys(1, "a", 0)).tolist()
    fixed = sum(order[i] == i for i in range(n))
    rising = sum(order[i] < order[i + 1] for i in range(n - 1))
    assert fixed < 10 and 440 < rising < 560
    firsts = Counter(permute(np.arange(1), 8, _round_keys(seed, "a", 0)).item() for seed in range(4000))
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
    for position, place in enumerate(mixture.places(0, 2 * BLOCK)):
        seen[place.source] += 1
        if position % 97 == 0:
            for name, weight in zip(names, weights, strict=True):
                # at most a few turns off the exact share, and never more than the rounding to a block allows
                assert abs(seen[name] - (position + 1) * weight / sum(weights)) <= len(weights) + 2 * len(weights)


def test_each_source_is_walked_without_gaps() -> None:
    mixture = Mixture({"a": 5, "b": 3}, {"a": 2.0, "b": 1.0}, seed=0, shuffle=False)
    places = mixture.places(0, 3 * BLOCK)
    for name, n in (("a", 5), ("b", 3)):
        own = [place for place in places if place.source == name]
        assert [(p.epoch, p.record) for p in own] == [divmod(i, n) for i in range(len(own))]


def test_weight_zero_leaves_a_source_out_and_nonsense_is_refused() -> None:
    mixture = Mixture({"a": 5, "b": 3}, {"a": 0.0, "b": 1.0}, seed=0, shuffle=True)
    assert {mixture[i].source for i in range(50)} == {"b"}
    with pytest.raises(ValueError, match="share above 0"):
        Mixture({"a": 5}, {"a": 0.0}, seed=0, shuffle=True)


ORDER = [("a", 314), ("a", 509), ("b", 68), ("a", 872), ("a", 122), ("a", 357)]
BLEND = [("a", 0, 307), ("b", 1, 57), ("b", 1, 40), ("a", 0, 149), ("b", 3, 34), ("a", 0, 68)]


def test_the_order_never_changes() -> None:
    """A resumed run must draw what the version that began it would have drawn."""
    mixture = Mixture({"a": 1000, "b": 77}, {"a": 3.0, "b": 1.0}, seed=1234, shuffle=True)
    assert [(p.source, p.record) for p in mixture.places(5000, 6)] == ORDER
    blend = Mixture({"a": 1000, "b": 77}, counts={"a": 500, "b": 154}, seed=1234, shuffle=True)
    assert [(p.source, p.epoch, p.record) for p in blend.places(650, 6)] == BLEND


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_a_cycle_of_a_blend_is_exact(sources: dict[str, tuple[int, int]], shuffle: bool, seed: int) -> None:
    """Each cycle holds so many of each source; over the cycles each source goes through all its records, then again."""
    records, counts = ({name: pair[i] for name, pair in sources.items()} for i in (0, 1))
    mixture = Mixture(records, counts=counts, seed=seed, shuffle=shuffle)
    size, cycles = sum(counts.values()), 3
    places = mixture.places(0, cycles * size)
    for c in range(cycles):
        assert Counter(place.source for place in places[c * size : (c + 1) * size]) == counts
    for name, n in records.items():
        own = Counter((p.epoch, p.record) for p in places if p.source == name)
        assert set(own.values()) == {1}, "no record twice in an epoch"
        assert {epoch for epoch, _ in own} == set(range(-(-cycles * counts[name] // n)))
        if not shuffle:
            assert [p[1:] for p in places if p.source == name] == [divmod(i, n) for i in range(cycles * counts[name])]
    some = [0, size - 1, size, 2 * size]
    assert [mixture[i] for i in some] == [places[i] for i in some]


def test_a_blend_is_mixed_and_every_cycle_otherwise() -> None:
    mixture = Mixture({"a": 100, "b": 100}, counts={"a": 300, "b": 100}, seed=0, shuffle=True)
    cycles = [[place.source for place in mixture.places(400 * c, 400)] for c in range(3)]
    assert len({tuple(cycle) for cycle in cycles}) == 3
    for cycle in cycles:
        assert all(55 <= cycle[i : i + 100].count("a") <= 92 for i in range(0, 400, 100))


def sources(**said: dict[str, Any]) -> dict[str, SourceConfig]:
    return {name: SourceConfig(path="x", **shares) for name, shares in said.items()}


def test_shares_come_from_the_configuration() -> None:
    cfg = sources(a={"epochs": 0.25}, b={"samples": 7}, c={"epochs": 0})
    assert drawn(cfg) == ["a", "b"]
    mixture = build_mixture(cfg, {"a": 10, "b": 3}, seed=0, shuffle=True)
    assert Counter(p.source for p in mixture.places(0, 9)) == {"a": 2, "b": 7}
    assert mixture.identity["shares"] == "counts" and mixture.identity["sources"] == {"a": [10, 2], "b": [3, 7]}
    assert drawn(sources(a={}, b={"weight": 0.0})) == ["a"]
    blend = sources(a={"weight": 0.0, "epochs": 2.0}, b={"epochs": 1.0}, c={"weight": 0.0})
    assert drawn(blend) == ["b"]
    assert drawn(sources(a={"weight": 0.0, "samples": 2}, b={})) == ["b"]
    weighed = build_mixture(sources(a={}, b={"weight": 3.0}), {"a": 2, "b": 2}, seed=0, shuffle=True)
    assert Counter(p.source for p in weighed.places(0, BLOCK)) == {"a": BLOCK // 4, "b": 3 * BLOCK // 4}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"a": {"weight": -1.0}}, r"sources\.a\.weight=-1"),
        ({"a": {"samples": -1}}, r"sources\.a\.samples=-1"),
        ({"a": {"epochs": float("nan")}}, r"sources\.a\.epochs=nan"),
        ({"a": {"weight": 1.0, "epochs": 2.0}}, "weight and epochs; set all but one to null"),
        ({"a": {"weight": 1.0}, "b": {"epochs": 2.0}}, r"sources\.a has a weight, data\.sources\.b epochs or samples"),
        ({"a": {"samples": 1}, "b": {}}, r"sources\.b has no share, data\.sources\.a epochs"),
        ({"a": {"weight": 0.0}}, "no source with a share above 0"),
        ({}, "no source with a share above 0"),
    ],
)
def test_shares_that_make_no_sense_are_refused(said: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn(sources(**said))


def test_epochs_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"epochs=0\.01 of 3 records is not one sample"):
        build_mixture(sources(a={"epochs": 0.01}), {"a": 3}, seed=0, shuffle=True)
