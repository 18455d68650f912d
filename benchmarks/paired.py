"""Compare the CPU time of two ways of doing the same work, on a machine that is busy with other things too.

Both run in turn, A B B A A B B A …, so that what drifts hits both alike. A pair gives a ratio; the median of the
ratios is what is claimed, with an interval from resampling the pairs. CPU time, not wall time: under load, wall times
of equal work differ by half, CPU times by a few in a hundred.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Side = Callable[[], float]
"""Does the work once; returns the CPU seconds that it took."""
Work = Sequence[tuple[float, float]]
"""Of every run, in order: CPU seconds, and items that it went through"""
_RESAMPLES = 2000


class Paired(NamedTuple):
    """CPU seconds of each run, pair by pair."""

    ours: list[float]
    theirs: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """How many times the CPU time of ours the other needs: median over the pairs, and its 95 % interval."""
        ratios = np.array(self.theirs) / np.array(self.ours)
        low, high = np.percentile(np.median(ratios[_draws(len(ratios))], axis=1), [2.5, 97.5])
        return float(np.median(ratios)), float(low), float(high)

    def rates(self, items: int) -> tuple[float, float]:
        """Items a CPU second of ours and of theirs, by the medians; items: how many one run goes through."""
        return items / float(np.median(self.ours)), items / float(np.median(self.theirs))


def _draws(pairs: int) -> np.ndarray:
    """[_RESAMPLES, pairs]: which pairs each resampling takes."""
    return np.random.Generator(np.random.PCG64(0)).integers(pairs, size=(_RESAMPLES, pairs))


def ratio_of_sums(ours: Work, theirs: Work) -> tuple[float, float, float]:
    """How many times the CPU time of ours the other needs for an item: all its items over all its seconds against the
    same of ours, and its 95 % interval from resampling the pairs. For runs of unlike work, where a median would leave
    out the few dear ones."""
    mine, other = np.array(ours), np.array(theirs)

    def ratio(which: np.ndarray) -> np.ndarray:
        a, b = mine[which].sum(axis=-2), other[which].sum(axis=-2)
        found: np.ndarray = (b[..., 0] / b[..., 1]) / (a[..., 0] / a[..., 1])
        return found

    low, high = np.percentile(ratio(_draws(len(mine))), [2.5, 97.5])
    return float(ratio(np.arange(len(mine)))), float(low), float(high)


def timed(work: Callable[[], object]) -> Side:
    """A side that runs in this process: all its threads count."""

    def run() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return run


def compare(ours: Side, theirs: Side, pairs: int, *, warm_up: bool = True) -> Paired:
    """Run both once to warm up, then so many pairs; warm_up=False: each run starts a process of its own."""
    if warm_up:
        ours()
        theirs()
    found = Paired([], [])
    for pair in range(pairs):
        for is_ours in (True, False) if pair % 2 == 0 else (False, True):
            if is_ours:
                found.ours.append(ours())
            else:
                found.theirs.append(theirs())
    return found
