"""Bytes as a person reads them: in GiB, MiB or KiB, whichever the size asks for. Pure."""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Unit(NamedTuple):
    """What figures that stand side by side are told in."""

    name: str
    bytes: int

    def of(self, size: float) -> str:
        """A size in this unit, without its name."""
        return f"{size / self.bytes:,.2f}"


UNITS = (Unit("GiB", GIB), Unit("MiB", 2**20), Unit("KiB", 2**10))


def unit_of(largest: float) -> Unit:
    """The largest unit of which there is one: 3 * 2**20 -> MiB. What is next to nothing is in KiB."""
    return next((unit for unit in UNITS if largest >= unit.bytes), UNITS[-1])


def told(size: float) -> str:
    """One size by itself, in its own unit: "3.00 MiB"."""
    unit = unit_of(size)
    return f"{unit.of(size)} {unit.name}"
