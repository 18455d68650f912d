"""Booking a step: every rank comes to the same ledger, and a source's own budget is the one that judges it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks
from vlm_nemo.data.config import DataConfig, SourceConfig
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.sample import BROKEN_IMAGE, TOO_LONG, WRONG_LENGTH, Drop
from vlm_nemo.train.accounting import Accounting
from vlm_nemo.train.config import OptimConfig, TrainerConfig
from vlm_nemo.types import UserError


def accounting(ranks: Any, ledger: Ledger, data_cfg: DataConfig) -> Accounting:
    from tests.tiny import tiny_model

    return Accounting(
        ranks=ranks,
        ledger=ledger,
        model_cfg=tiny_model(),
        data_cfg=data_cfg,
        optim_cfg=OptimConfig(projector_lr=1e-3),
        trainer_cfg=TrainerConfig(),
    )


def counted() -> dict[str, Any]:
    """Two replicas: the plan's drop is known to both, what was found while reading to one each."""
    from vlm_nemo.data.loader import StepData
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.runtime.config import ParallelConfig

    with device.adapter():
        ranks = groups.start(ParallelConfig(), seed=0)
        local = [
            [Drop("captions", BROKEN_IMAGE, '00000.tar/1 (größe, "7")')],
            [Drop("instruct", WRONG_LENGTH, "00001.tar/" + "9" * 300), Drop("captions", BROKEN_IMAGE, "00002.tar/5")],
        ][ranks.data_rank]
        data = StepData(
            batches=[],
            rows=[],
            keys=[],
            state={},
            planned_drops=[Drop("instruct", TOO_LONG, "00003.tar/3")],
            local_drops=local,
            seen=31,
            used={"captions": 10, "instruct": 20},
            delay=3,
            vision_balance=1.0,
        )
        ledger = Ledger()
        ledger.quiet = True
        books = accounting(ranks, ledger, DataConfig())
        books._count(data, lost=3)
        data.local_drops = []
        books._count(data, lost=0)
        return ledger.to_json()


def test_all_ranks_book_the_same() -> None:
    first, second = run_ranks(counted, 2)
    assert first == second
    assert (first["seen"], first["used"]) == (62, 57)
    assert first["dropped"] == {"captions": {BROKEN_IMAGE: 2}, "instruct": {TOO_LONG: 2, WRONG_LENGTH: 1}}
    assert first["sources"]["captions"] == {
        "seen": 20,
        "used": 18,
        "examples": {BROKEN_IMAGE: '00000.tar/1 (größe, "7")'},
        "recent": [[20, 2]],
    }
    assert first["sources"]["instruct"]["seen"] == 42


def booked() -> tuple[Any, bool, dict[str, int]]:
    """A step of which each rank knows other numbers, and how often the device was looked at for it."""
    from tests.train.test_reads import reads
    from vlm_nemo.data.loader import StepData
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.runtime.config import ParallelConfig
    from vlm_nemo.train.step import StepResult

    with device.adapter():
        ranks = groups.start(ParallelConfig(), seed=0)
        books = accounting(ranks, Ledger(), DataConfig())
        nothing = dict(batches=[], rows=[], keys=[], state={}, planned_drops=[], local_drops=[], seen=0, used={})
        data = StepData(delay=0, vision_balance=1.0, **nothing)
        mine = ranks.rank + 1
        result = StepResult(loss_sum=3.0 * mine, loss_tokens=mine, grad_norm=1.0, applied=True)
        found: list[Any] = []
        looks = reads(
            lambda: found.extend(
                books.book(1, data, result, factor=1.0, seconds=0.5, waited=0.25 * mine, stop=mine == 1)
            )
        )
        groups.stop()
        metrics, stopping = found
        return (metrics.loss, metrics.data_wait_s), stopping, looks


def test_a_step_is_booked_in_one_look() -> None:
    """Sums and what is largest come together: the mean loss, the longest wait, whether any rank stops."""
    assert run_ranks(booked, 2) == [((3.0, 0.5), True, {"tolist": 1})] * 2


def test_a_source_is_judged_by_its_own_budget() -> None:
    sources = {"web": SourceConfig(path="x", max_bad_fraction=0.3), "talk": SourceConfig(path="y")}
    cfg = DataConfig(sources=sources, max_bad_fraction=0.01)
    ledger = Ledger.of({"web": (800, {BROKEN_IMAGE: 200}), "talk": (995, {TOO_LONG: 5})})
    accounting(None, ledger, cfg).judge()
    sources["web"].max_bad_fraction = 0.1
    with pytest.raises(
        UserError, match=r"200 of 1000 samples of source web .*data\.sources\.web\.max_bad_fraction=0\.1"
    ):
        accounting(None, ledger, cfg).judge()
    sources["web"].max_bad_fraction = None
    with pytest.raises(UserError, match=r"source web .* data\.max_bad_fraction=0\.01"):
        accounting(None, ledger, cfg).judge()


def test_lengths_of_samples_leave_the_padding_out() -> None:
    from tests.tiny import row, sample

    assert row([sample(0, 9, 0), sample(1, 20, 0)], 48).lengths == [9, 20]
    assert row([sample(0, 28, 0), sample(1, 20, 0)], 48).lengths == [28, 20]
