"""What does not fit, and which knob helps: layouts tried one after the other, nearest first. Pure but for `needs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

Peak = Callable[[ParallelConfig], int]
"""Bytes of the fullest rank under a layout. Raises UserError for a layout that this model or world cannot have."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One change of a recipe."""

    words: tuple[str, ...]
    """As on the command line: parallel.recompute=full"""
    parallel: ParallelConfig
    peak: int


def knobs(parallel: ParallelConfig, world: int) -> Iterator[tuple[tuple[str, ...], ParallelConfig]]:
    """Changes to try: what costs least speed first."""
    if not parallel.distributed_optimizer:
        yield ("parallel.distributed_optimizer=true",), replace(parallel, distributed_optimizer=True)
    if parallel.tensor > 1 and not parallel.sequence:
        yield ("parallel.sequence=true",), replace(parallel, sequence=True)
    if parallel.recompute != "full":
        yield ("parallel.recompute=full",), replace(parallel, recompute="full")
    expert = 2 * parallel.expert
    while expert <= 64 and world // parallel.pipeline % expert == 0:  # a dense model refuses them
        yield (f"parallel.expert={expert}",), replace(parallel, expert=expert)
        expert *= 2
    tensor = 2 * parallel.tensor
    while tensor <= 8 and world % (tensor * parallel.pipeline) == 0:
        words = (f"parallel.tensor={tensor}", "parallel.sequence=true")
        yield words, replace(parallel, tensor=tensor, sequence=True)
        yield (*words, "parallel.recompute=full"), replace(parallel, tensor=tensor, sequence=True, recompute="full")
        tensor *= 2
    pipeline = 2 * parallel.pipeline
    while pipeline <= 16 and world % (pipeline * parallel.tensor) == 0:
        words = (f"parallel.pipeline={pipeline}", "parallel.recompute=full")
        yield words, replace(parallel, pipeline=pipeline, recompute="full")
        pipeline *= 2


def first_that_fits(parallel: ParallelConfig, world: int, limit: int, peak: Peak) -> Knob | None:
    """The first of `knobs` under which the fullest rank needs no more than `limit` bytes."""
    for words, changed in knobs(parallel, world):
        try:
            found = peak(changed)
        except UserError:  # this model does not split so
            continue
        if found <= limit:
            return Knob(words=words, parallel=changed, peak=found)
    return None
