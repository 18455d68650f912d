"""The ledger: used + dropped = seen, each drop named once, a limit that names the culprit."""

from __future__ import annotations

import json
import logging

import pytest

from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.sample import BROKEN_IMAGE, TOO_LONG, Drop
from vlm_nemo.types import UserError

A = Drop("captions", BROKEN_IMAGE, "00000.tar/1")
B = Drop("instruct", TOO_LONG, "00003.tar/7")


def test_counts_add_up_and_each_drop_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    with caplog.at_level(logging.WARNING):
        ledger.add(seen=10, used=8, drops=[A, B])
        ledger.add(seen=5, used=4, drops=[A])
    assert ledger.to_json() == {
        "seen": 15,
        "used": 12,
        "dropped": {"captions": {BROKEN_IMAGE: 2}, "instruct": {TOO_LONG: 1}},
    }
    assert ledger.seen == ledger.used + ledger.total_dropped
    assert [record.getMessage() for record in caplog.records] == [
        "dropped captions 00000.tar/1: broken image",
        "dropped instruct 00003.tar/7: too long",
    ]
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    again.add(seen=1, used=1, drops=[])
    assert again.to_json()["seen"] == 16


def test_a_sample_that_is_lost_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="10 samples seen, but 8 used and 1 dropped"):
        Ledger().add(seen=10, used=8, drops=[A])
    with pytest.raises(UserError, match="3 seen is not 1 used"):
        Ledger.from_json({"seen": 3, "used": 1, "dropped": {"a": {"x": 1}}})


def test_the_limit() -> None:
    ledger = Ledger()
    ledger.add(seen=99, used=97, drops=[A, B])
    ledger.check(0.01, 100)  # too few to judge
    ledger.add(seen=1, used=1, drops=[])
    ledger.check(0.02, 100)  # just at the limit
    with pytest.raises(UserError, match=r"2 of 100 .*captions: 1 broken image.*max_bad_fraction=0\.01"):
        ledger.check(0.01, 100)
