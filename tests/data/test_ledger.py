"""The ledger: used + dropped = seen by source, each drop named once, budgets that name the culprit."""

from __future__ import annotations

import json
import logging
import random

import pytest

from vlm_nemo.data.ledger import STEPS, Ledger, check_budget
from vlm_nemo.data.sample import BROKEN_IMAGE, TOO_LONG, Drop
from vlm_nemo.types import UserError

A = Drop("captions", BROKEN_IMAGE, "00000.tar/1")
B = Drop("instruct", TOO_LONG, "00003.tar/7")


def test_counts_add_up_and_each_drop_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    with caplog.at_level(logging.WARNING):
        ledger.add(seen=10, used={"captions": 3, "instruct": 5}, drops=[A, B])
        ledger.add(seen=5, used={"captions": 4}, drops=[A._replace(key="00009.tar/3")])
        ledger.add(seen=1, used={}, drops=[A])
    assert ledger.to_json() == {
        "seen": 16,
        "used": 12,
        "dropped": {"captions": {BROKEN_IMAGE: 3}, "instruct": {TOO_LONG: 1}},
        "sources": {
            "captions": {"seen": 10, "used": 7, "examples": {BROKEN_IMAGE: "00000.tar/1"}, "recent": [[10, 3]]},
            "instruct": {"seen": 6, "used": 5, "examples": {TOO_LONG: "00003.tar/7"}, "recent": [[6, 1]]},
        },
    }
    ledger.assert_whole(16)
    assert [record.getMessage() for record in caplog.records] == [
        "dropped captions 00000.tar/1: broken image",
        "dropped instruct 00003.tar/7: too long",
        "dropped captions 00009.tar/3: broken image",
    ]
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.to_json() == ledger.to_json()
    again.add(seen=1, used={"captions": 1}, drops=[])
    assert again.to_json()["seen"] == 17


def test_a_sample_that_is_lost_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="10 samples seen, but 8 used and 1 dropped"):
        Ledger().add(seen=10, used={"captions": 8}, drops=[A])
    with pytest.raises(RuntimeError, match="1 samples seen, but 0 used"):
        Ledger().add(seen=1, used={"a": -1, "b": 1}, drops=[A])
    ledger = Ledger.of({"captions": (8, {BROKEN_IMAGE: 2})})
    ledger.assert_whole(10)
    with pytest.raises(RuntimeError, match="10 samples seen, 8 used and 2 dropped; the loader gave out 11"):
        ledger.assert_whole(11)
    content = ledger.to_json()
    with pytest.raises(UserError, match="11 seen and 8 used are not 8 used"):
        Ledger.from_json({**content, "seen": 11})
    with pytest.raises(UserError, match="an older version wrote it"):
        Ledger.from_json({"seen": 1, "used": 1, "dropped": {}})


def test_the_limit_of_all() -> None:
    ledger = Ledger()
    ledger.add(seen=99, used={"captions": 49, "instruct": 48}, drops=[A, B])
    ledger.check(0.01, 100)  # too few to judge
    ledger.add(seen=1, used={"captions": 1}, drops=[])
    ledger.check(0.02, 100)  # just at the limit
    with pytest.raises(UserError) as error:
        ledger.check(0.01, 100)
    assert str(error.value) == (
        "2 of 100 samples had to be dropped: 1 captions: broken image (00000.tar/1), 1 instruct: too long "
        "(00003.tar/7); more than data.max_bad_fraction=0.01, so mend the data or raise the limit"
    )


def test_the_limit_of_a_source() -> None:
    """A bad source does not hide among good ones, and one that is known to be bad does not spend the others' budget."""
    ledger = Ledger()
    ledger.add(seen=1200, used={"captions": 1000, "instruct": 195}, drops=[B, B, B, B._replace(reason=BROKEN_IMAGE), B])
    with pytest.raises(UserError) as error:
        ledger.check(0.01, 100)
    assert str(error.value).startswith(
        "5 of 200 samples of source instruct had to be dropped: 4 too long (00003.tar/7), 1 broken image (00003.tar/7);"
    )
    assert "more than data.max_bad_fraction=0.01" in str(error.value)
    ledger.check(0.01, 100, own={"instruct": 0.03})
    with pytest.raises(UserError, match=r"more than data\.sources\.instruct\.max_bad_fraction=0\.02"):
        ledger.check(0.9, 100, own={"instruct": 0.02})
    ledger.check(0.001, 100, own={"instruct": 0.5})


def test_the_table() -> None:
    ledger = Ledger.of({"captions": (1000, {}), "b": (7, {})})
    ledger.add(seen=3, used={}, drops=[A, A, A._replace(reason=TOO_LONG)])
    assert ledger.table().splitlines() == [
        "source     seen   used  dropped",
        "b             7      7        0",
        "captions  1,003  1,000        3",
        "                              2  broken image, as 00000.tar/1",
        "                              1  too long, as 00000.tar/1",
        "all       1,010  1,007        3",
    ]


def test_a_source_that_goes_bad_late_is_found_within_a_window() -> None:
    """A million good samples buy no ten thousand bad ones; where a run was resumed changes nothing."""
    ledger = Ledger()
    ledger.add(seen=1_000_000, used={"captions": 1_000_000}, drops=[])
    resumed, bad = 0, 0
    while True:
        ledger.add(seen=10, used={"captions": 5}, drops=[A] * 5)
        bad += 5
        again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
        assert again.to_json() == ledger.to_json()
        if bad == 10:
            ledger, resumed = again, resumed + 1
        try:
            ledger.check(0.01, 100)
        except UserError as error:
            assert "of the last" in str(error) and "of source captions" in str(error)
            assert "more than data.max_bad_fraction=0.01" in str(error)
            break
    assert resumed and bad <= 600
    ledger.check(0.01, 100, own={"captions": 0.9})


def test_a_source_within_its_budget_never_stops_by_its_last_samples() -> None:
    rng = random.Random(0)
    ledger = Ledger()
    ledger.quiet = True
    for _ in range(5000):
        bad = sum(rng.random() < 0.009 for _ in range(40))
        ledger.add(seen=40, used={"captions": 40 - bad}, drops=[A] * bad)
        ledger._check_recent("captions", ledger.sources["captions"], 0.01, "limit")
    parts = ledger.sources["captions"].recent
    assert len(parts) <= STEPS + 1 and 1000 <= sum(seen for seen, _ in parts) < 1200


@pytest.mark.parametrize("value", [50, float("nan"), -1, float("inf")])
def test_a_budget_that_makes_no_sense(value: float) -> None:
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=.* must be a share from 0 to 1"):
        check_budget("data", value)
    with pytest.raises(UserError, match="^min_samples_before_stop=-1 must be at least 0"):
        check_budget("", 1.0, -1)
