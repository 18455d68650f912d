"""Bytes as a person reads them."""

from __future__ import annotations

import pytest

from vlm_nemo.check.sizes import told, unit_of


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0.00 KiB"),
        (512, "0.50 KiB"),
        (2**20 - 1, "1,024.00 KiB"),
        (2**20, "1.00 MiB"),
        (3.5 * 2**30, "3.50 GiB"),
        (2**41, "2,048.00 GiB"),
    ],
)
def test_the_unit_follows_the_size(size: float, words: str) -> None:
    assert told(size) == words


def test_a_column_has_the_unit_of_its_largest() -> None:
    assert [unit_of(2**30).of(size) for size in (2**30, 2**29, 2**20)] == ["1.00", "0.50", "0.00"]
