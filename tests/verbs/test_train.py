"""What a training says of its data when it starts."""

from __future__ import annotations

import time

import numpy as np

from vlm_nemo.data.config import PackConfig
from vlm_nemo.verbs.train import judge_packing

CAPTIONS = np.random.default_rng(0).integers(584, 601, 2048).tolist()


def test_rows_that_stay_empty_are_a_warning_that_names_a_better_capacity() -> None:
    judge_packing(CAPTIONS, None, PackConfig())  # imports torch
    started = time.process_time()
    line, warning = judge_packing(CAPTIONS, 1_000_000, PackConfig(capacity=4096))
    assert time.process_time() - started < 0.3
    assert line.startswith("data: a cycle is 1,000,000 samples, 59") and "; rows of 4096 fill to 88." in line
    assert warning is not None and warning.startswith("data.pack.capacity 4096 fills to 88.")
    assert "4736 would fill to 9" in warning or "4736 would fill to 100" in warning


def test_rows_that_fill_are_one_line() -> None:
    line, warning = judge_packing(CAPTIONS, None, PackConfig(capacity=4736))
    assert warning is None and line.startswith("data: 592 tokens a sample; rows of 4736 fill to 99.")
    # A tenth cannot be used, a tenth does not fit
    mixed = [0, 9000, *range(100, 900, 100)] * 20
    line, warning = judge_packing(mixed, 200, PackConfig(capacity=4096))
    assert line.startswith("data: a cycle is 200 samples, 72,000 tokens; ") and warning is None


def test_samples_none_of_which_fits() -> None:
    line, warning = judge_packing([0, 0], None, PackConfig())
    assert "fill to 0.00 %" in line and warning is None
    line, warning = judge_packing([5000] * 9, None, PackConfig())
    assert warning is not None and "9 of 9 samples are longer than 4096" in warning
