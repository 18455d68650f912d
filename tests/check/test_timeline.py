"""When stages work and wait, against pictures drawn by hand and the formula of equal stages."""

from __future__ import annotations

import pytest

from vlm_nemo.check.timeline import one_f_one_b


def test_the_picture_of_the_docstring() -> None:
    line = one_f_one_b([1, 1], [2, 2], micro=3)
    assert line.total == 12
    assert line.busy == (9, 9)
    assert line.bubble == pytest.approx(1 - 18 / 24)
    assert line.balance == 1


@pytest.mark.parametrize(("stages", "micro"), [(1, 5), (2, 2), (4, 4), (4, 16), (8, 3)])
def test_equal_stages_wait_as_the_formula_says(stages: int, micro: int) -> None:
    """(p - 1) / (m + p - 1): Narayanan et al., 2021, section 2.2."""
    line = one_f_one_b([1.0] * stages, [2.0] * stages, micro)
    assert line.bubble == pytest.approx((stages - 1) / (micro + stages - 1))


def test_a_heavy_first_stage_makes_the_others_wait() -> None:
    even = one_f_one_b([1, 1], [2, 2], micro=8)
    heavy = one_f_one_b([3, 1], [6, 2], micro=8)
    assert heavy.bubble > even.bubble
    assert heavy.balance == pytest.approx(1.5)
    assert heavy.total == 8 * 9  # the heavy stage itself never waits
    assert heavy.bubble == pytest.approx(1 - (8 * 9 + 8 * 3) / (2 * 8 * 9))
