"""What does not fit, and which knob helps: layouts tried one after the other, nearest first. Pure but for `needs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlm_nemo.model.stages import WORTH, Costs, as_words, balanced, busiest, stage_costs
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import vision_alone
from vlm_nemo.types import UserError

SKEWED = 0.1
"""By how much it may be above the mean."""
Peak = Callable[[ParallelConfig], int]
"""Bytes of the fullest rank under a layout. Raises UserError for a layout that this model or world cannot have."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One change of a recipe."""

    words: tuple[str, ...]
    """As on the command line: parallel.recompute=full"""
    parallel: ParallelConfig
    peak: int


def knobs(
    parallel: ParallelConfig, world: int, vision_learns: bool = False
) -> Iterator[tuple[tuple[str, ...], ParallelConfig]]:
    """Changes to try: what costs least speed first."""
    if not parallel.distributed_optimizer:
        yield ("parallel.distributed_optimizer=true",), replace(parallel, distributed_optimizer=True)
    if parallel.tensor > 1 and not parallel.sequence:
        yield ("parallel.sequence=true",), replace(parallel, sequence=True)
    if vision_alone(parallel):
        yield ("parallel.vision=null",), replace(parallel, vision=None)
    if vision_learns and parallel.recompute_vision != "full":
        yield ("parallel.recompute_vision=full",), replace(parallel, recompute_vision="full")
    if parallel.recompute == "none":
        yield ("parallel.recompute=selective",), replace(parallel, recompute="selective")
    if parallel.recompute != "full":
        yield ("parallel.recompute=full",), replace(parallel, recompute="full")
    expert = 2 * parallel.expert
    while expert <= 64 and world // parallel.pipeline % expert == 0:  # a dense model refuses them
        yield (f"parallel.expert={expert}",), replace(parallel, expert=expert)
        expert *= 2
    tensor = 2 * parallel.tensor
    while tensor <= 8 and world % (tensor * parallel.pipeline * parallel.context) == 0:
        words = (f"parallel.tensor={tensor}", "parallel.sequence=true")
        wider = replace(parallel, tensor=tensor, sequence=True, vision=1 if parallel.vision == 1 else None)
        yield words, wider
        yield (*words, "parallel.recompute=full"), replace(wider, recompute="full")
        tensor *= 2
    context = 2 * parallel.context
    while context <= 16 and world % (context * parallel.tensor * parallel.pipeline) == 0:
        words = (f"parallel.context={context}", "parallel.recompute=full")
        yield words, replace(parallel, context=context, recompute="full")
        context *= 2
    pipeline = 2 * parallel.pipeline
    while pipeline <= 16 and world % (pipeline * parallel.tensor * parallel.context) == 0:
        words = (f"parallel.pipeline={pipeline}", "parallel.recompute=full")
        yield words, replace(parallel, pipeline=pipeline, layers=[], recompute="full")
        pipeline *= 2


def better_cut(costs: Costs, parallel: ParallelConfig) -> str:
    """What the stages are, and what would balance them better. parallel.layers is filled in."""
    what = as_words(parallel.layers)
    now, best = (
        busiest(stage_costs(costs, layers, parallel.pipeline))
        for layers in (parallel.layers, balanced(costs, parallel))
    )
    if now > best * (1 + WORTH):
        return f"{what}; parallel.layers=[] makes it {best:.2f} x"
    if parallel.layers[0] == 0 and now > 1 + SKEWED:
        return f"{what}; the images alone fill the first stage: lower parallel.pipeline, or raise parallel.tensor"
    return what


def first_that_fits(
    parallel: ParallelConfig, world: int, limit: int, peak: Peak, vision_learns: bool = False
) -> Knob | None:
    """The first of `knobs` under which the fullest rank needs no more than `limit` bytes."""
    for words, changed in knobs(parallel, world, vision_learns):
        try:
            found = peak(changed)
        except UserError:  # this model does not split so
            continue
        if found <= limit:
            return Knob(words=words, parallel=changed, peak=found)
    return None
