"""Bytes and FLOPs as a person reads them."""

from __future__ import annotations

import pytest

from vlm_nemo.check.sizes import BYTES, FLOPS, Unit, told, unit_of


@pytest.mark.parametrize(
    ("units", "figure", "words"),
    [
        (BYTES, 0, "0.00 KiB"),
        (BYTES, 512, "0.50 KiB"),
        (BYTES, 2**20 - 1, "1,024.00 KiB"),
        (BYTES, 2**20, "1.00 MiB"),
        (BYTES, 3.5 * 2**30, "3.50 GiB"),
        (BYTES, 2**41, "2,048.00 GiB"),
        (FLOPS, 5e4, "0.05 MFLOP"),
        (FLOPS, 2.5e6, "2.50 MFLOP"),
        (FLOPS, 9.996e9, "10.00 GFLOP"),
        (FLOPS, 1e12, "1.00 TFLOP"),
        (FLOPS, 1.5e18, "1,500.00 PFLOP"),
    ],
)
def test_the_unit_follows_the_figure(units: tuple[Unit, ...], figure: float, words: str) -> None:
    assert told(figure, units) == words


def test_a_column_has_the_unit_of_its_largest() -> None:
    assert [unit_of(2**30).of(size) for size in (2**30, 2**29, 2**20)] == ["1.00", "0.50", "0.00"]
