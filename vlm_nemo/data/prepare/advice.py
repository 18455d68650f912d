"""Will these lengths fill a row? If not, name the nearest length of row that they do fill. Pure.

Captions of one image each are all about 592 tokens long: six of them leave 544 of 4096 empty, whatever a packer does.
No algorithm mends that, another capacity does: 4736 holds eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TARGET = 0.99
"""A fill from here on needs no advice."""
WARN_BELOW = 0.95
"""A planned fill below this is worth a warning before a run."""
STEP = 128
"""Capacities are named in multiples of this: whole tiles for the matrix units."""
MAX_SAMPLES = 8192
"""Lengths that are tried; the fill of more differs by some tenths of a percent at most."""
MAX_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Fill:
    """How full the rows of one capacity get."""

    capacity: int
    """Tokens a row."""
    fill: float
    """Used tokens over the tokens of all rows, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What a capacity does with a list of lengths."""

    wanted: Fill
    too_long: int
    """Samples, of those given, that do not fit a row."""
    samples: int
    """Samples given."""
    lower: Fill | None
    """Nearest capacity below that reaches TARGET; None if there is none, or none is needed."""
    higher: Fill | None

    @property
    def better(self) -> Fill | None:
        """The nearer one; the higher at a tie."""
        found = [fill for fill in (self.higher, self.lower) if fill is not None]
        return min(found, key=lambda fill: abs(fill.capacity - self.wanted.capacity), default=None)

    def __str__(self) -> str:
        """One line for people: "capacity 4096 fills to 89.0 %; 3584 would fill to 99.1 %, 4736 would …"."""
        text = f"capacity {self.wanted.capacity} fills to {percent(self.wanted.fill)}"
        if self.wanted.fill < TARGET:
            found = [f for f in (self.lower, self.higher) if f is not None]
            text += "; " + (
                ", ".join(f"{f.capacity} would fill to {percent(f.fill)}" for f in found)
                or f"no capacity up to {2 * self.wanted.capacity} reaches {percent(TARGET)}: mix in samples of other "
                "lengths"
            )
        if self.too_long:
            text += f"; {self.too_long} of {self.samples} samples are longer than {self.wanted.capacity}"
        return text


def percent(fill: float) -> str:
    """0.99987 -> "99.98 %": cut, not rounded, so that 100.00 % means full."""
    return f"{int(fill * 10000 + 1e-6) / 100:.2f} %"


def pack_fill(lengths: Sequence[int] | np.ndarray, capacity: int, *, pool: int = 64, seed: int = 0) -> float:
    """Fill, 0 to 1, of rows of `capacity` tokens when samples of `lengths` come in a random order.

    Runs the packer itself on at most MAX_SAMPLES of them. Lengths above the capacity (or below 1) are left out; 0.0
    if none is left. The pool is refilled from the same lengths, so a short list is judged as if it went on.
    """
    from vlm_nemo.data.packing import Packer  # late: it imports torch

    usable = np.asarray(lengths, dtype=np.int64)
    usable = usable[(usable > 0) & (usable <= capacity)]
    if not len(usable):
        return 0.0
    rng = np.random.default_rng(seed)
    # Rows until each length was drawn about once; a list shorter than a few pools comes again
    drawn = usable[rng.permutation(len(usable))[:MAX_SAMPLES]].tolist()
    rows = min(MAX_ROWS, max(8, sum(drawn) // capacity))
    packer = Packer(capacity, pool)
    used, given = 0, 0
    for _ in range(rows):
        while not packer.full:
            packer.add(given, drawn[given % len(drawn)])
            given += 1
        used += sum(drawn[item % len(drawn)] for item in packer.pop())
    return used / (rows * capacity)


def advise(
    lengths: Sequence[int] | np.ndarray, capacity: int, *, pool: int = 64, target: float = TARGET, step: int = STEP
) -> Advice:
    """Fill at `capacity`, and where it is below `target` the nearest multiples of `step` on both sides that reach it.

    Looks from half to twice the capacity. A capacity that leaves out more samples as too long is no better. Raises
    ValueError without lengths.
    """
    values = np.asarray(lengths, dtype=np.int64)
    values = values[values > 0]
    if not len(values):
        raise ValueError("no lengths to judge a capacity by")
    rng = np.random.default_rng(0)
    longest = int(values[values <= capacity].max(initial=0))
    too_long = int((values > capacity).sum())
    drawn = values if len(values) <= MAX_SAMPLES else values[rng.choice(len(values), MAX_SAMPLES, replace=False)]
    wanted = Fill(capacity=capacity, fill=pack_fill(drawn, capacity, pool=pool))
    lower = higher = None
    if wanted.fill < target:
        below = range((capacity - 1) // step * step, max(longest, capacity // 2) - 1, -step)
        above = range((capacity // step + 1) * step, 2 * capacity + 1, step)
        lower = _first(drawn, below, pool, target)
        higher = _first(drawn, above, pool, target)
    return Advice(wanted=wanted, too_long=too_long, samples=len(values), lower=lower, higher=higher)


def _first(lengths: np.ndarray, capacities: range, pool: int, target: float) -> Fill | None:
    for capacity in capacities:
        if capacity > 0 and (fill := pack_fill(lengths, capacity, pool=pool)) >= target:
            return Fill(capacity=capacity, fill=fill)
    return None
