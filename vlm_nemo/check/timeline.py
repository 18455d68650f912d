"""When the stages of a pipeline work and when they wait. Pure.

1F1B: a stage warms up with forwards, then takes one backward for each forward, then drains. Two stages, three
micro-batches, a backward as long as two forwards:

    stage 0   F F B B . F B B . . B B      '.' waits
    stage 1   . F B B F B B F B B . .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One optimizer step of a pipeline, in the unit of the costs that it was made of."""

    total: float
    """From the first forward to the last backward."""
    busy: tuple[float, ...]
    """What each stage works."""

    @property
    def bubble(self) -> float:
        """Share of the stages' time that is waiting, 0 to 1."""
        return 1 - sum(self.busy) / (self.total * len(self.busy))

    @property
    def balance(self) -> float:
        """The busiest stage over the mean; 1 = all equal."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


def one_f_one_b(forward: Sequence[float], backward: Sequence[float], micro: int) -> Timeline:
    """Of stages whose forward and backward of one micro-batch cost so much; sending is free.

    Without interleaving; with virtual chunks the warm-up is shorter, so this is an upper bound of their bubble.
    """
    stages = len(forward)
    orders = [_order(stage, stages, micro) for stage in range(stages)]
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(orders[s]):
                kind, i = orders[s][at[s]]
                source = (kind, s - 1, i) if kind == "F" else (kind, s + 1, i)
                first = s == 0 if kind == "F" else s == stages - 1
                if not first and source not in done:
                    break
                clock[s] = max(clock[s], 0.0 if first else done[source])
                clock[s] += forward[s] if kind == "F" else backward[s]
                done[kind, s, i] = clock[s]
                at[s] += 1
    busy = tuple(micro * (f + b) for f, b in zip(forward, backward, strict=True))
    return Timeline(total=max(clock), busy=busy)


def _order(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """What a stage does, in megatron's order."""
    warm = min(stages - stage - 1, micro)
    order = [("F", i) for i in range(warm)]
    for i in range(micro - warm):
        order += [("F", warm + i), ("B", i)]
    return order + [("B", i) for i in range(micro - warm, micro)]


def in_flight(stage: int, stages: int, micro: int) -> int:
    """Most micro-batches whose activations a stage holds at once."""
    return min(stages - stage, micro)
