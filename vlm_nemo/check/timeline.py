"""When the stages of a pipeline work and when they wait, and what they hold meanwhile. Pure.

A stage warms up with forwards, then takes one backward for each forward, then drains, in megatron's order of its
chunks. With one chunk a stage that is 1F1B; two stages, three micro-batches, a backward as long as two forwards:

    stage 0   F F . . B B F B B . B B      '.' waits
    stage 1   . F B B F B B F B B . .

With more chunks it is the interleaved schedule, whose waits are as long as a chunk, not as a stage; two chunks (F B and
f b), two micro-batches, a backward as long as a forward:

    stage 0   F F f f . b . b B B
    stage 1   . F F f b f b B B .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_schedule_table


class Pass(NamedTuple):
    """What a stage does at a time: a chunk's forward or backward of one micro-batch."""

    forward: bool
    micro: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One optimizer step of a pipeline, in the unit of the costs that it was made of."""

    total: float
    """From the first forward to the last backward."""
    busy: tuple[float, ...]
    """What each stage works."""
    in_flight: tuple[int, ...]
    """Most passes of a chunk whose activations each stage holds at once."""

    @property
    def bubble(self) -> float:
        """Share of the stages' time that is waiting, 0 to 1."""
        return 1 - sum(self.busy) / (self.total * len(self.busy))

    @property
    def balance(self) -> float:
        """The busiest stage over the mean; 1 = all equal."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


def simulate(forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], micro: int) -> Timeline:
    """Of stages whose chunks' forward and backward of one micro-batch cost so much; sending is free.

    forward, backward: stage by stage, chunk by chunk; each stage has as many chunks.
    """
    stages, virtual = len(forward), len(forward[0])
    orders = [order(stage, stages, virtual, micro) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(orders[s]):
                step = orders[s][at[s]]
                place = step.chunk * stages + s  # in the model: chunks go round the stages
                first = place == 0 if step.forward else place == stages * virtual - 1
                source = (step.forward, step.micro, place + (-1 if step.forward else 1))
                if not first and source not in done:
                    break
                clock[s] = max(clock[s], 0.0 if first else done[source])
                clock[s] += (forward if step.forward else backward)[s][step.chunk]
                done[step.forward, step.micro, place] = clock[s]
                at[s] += 1
    return Timeline(
        total=max(clock),
        busy=tuple(micro * (sum(f) + sum(b)) for f, b in zip(forward, backward, strict=True)),
        in_flight=tuple(max(map(sum, held(passes, virtual))) for passes in orders),
    )


def order(stage: int, stages: int, virtual: int, micro: int) -> list[Pass]:
    """What a stage does, in megatron's order: forwards and backwards each go by groups of as many micro-batches as
    there are stages, a chunk after the other."""
    assert virtual == 1 or micro % stages == 0, "megatron refuses it"
    table = get_schedule_table(micro, virtual, stages)
    forwards = [Pass(True, number, chunk) for number, chunk in table]
    backwards = [Pass(False, number, virtual - 1 - chunk) for number, chunk in table]
    warm = min(warm_up(stage, stages, virtual), len(table))
    pairs = zip(forwards[warm:], backwards, strict=False)
    return [*forwards[:warm], *(step for pair in pairs for step in pair), *backwards[len(table) - warm :]]


def warm_up(stage: int, stages: int, virtual: int) -> int:
    """Forwards before a stage's first pair of forward and backward, where there are as many."""
    after = stages - stage - 1
    return after if virtual == 1 else 2 * after + (virtual - 1) * stages


def held(passes: Sequence[Pass], virtual: int) -> list[tuple[int, ...]]:
    """During each pass: of every chunk, the micro-batches whose activations the stage holds."""
    now, found = [0] * virtual, []
    for step in passes:
        now[step.chunk] += step.forward
        found.append(tuple(now))
        now[step.chunk] -= not step.forward
    return found
