"""Bytes, FLOPs and counts as a person reads them: in MiB or GFLOP, whichever the figure asks for. Pure."""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Unit(NamedTuple):
    """What figures that stand side by side are told in."""

    name: str
    size: float

    def of(self, figure: float) -> str:
        """A figure in this unit, without its name."""
        return f"{figure / self.size:,.2f}"


BYTES = (Unit("GiB", GIB), Unit("MiB", 2**20), Unit("KiB", 2**10))
FLOPS = (Unit("PFLOP", 1e15), Unit("TFLOP", 1e12), Unit("GFLOP", 1e9), Unit("MFLOP", 1e6))


def unit_of(largest: float, units: tuple[Unit, ...] = BYTES) -> Unit:
    """The largest unit of which there is one: 3 * 2**20 -> MiB. What is next to nothing is in the smallest."""
    return next((unit for unit in units if largest >= unit.size), units[-1])


def told(figure: float, units: tuple[Unit, ...] = BYTES) -> str:
    """One figure by itself, in its own unit: "3.00 MiB"."""
    unit = unit_of(figure, units)
    return f"{unit.of(figure)} {unit.name}"


def many(number: int, what: str, plural: str = "s") -> str:
    """(1, "rank") -> "1 rank"; (1024, "rank") -> "1,024 ranks"."""
    return f"{number:,} {what}" + ("" if number == 1 else plural)
