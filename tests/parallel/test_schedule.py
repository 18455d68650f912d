"""The passes that the plan simulates are those that megatron's schedules make, and so are the activations held."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.ranks import run_ranks
from vlm_nemo.check.timeline import Pass, held, order, simulate
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

CASES = [(2, 2), (2, 4), (2, 6), (1, 1), (1, 3)]
"""Chunks a stage, micro-batches."""


class Saved:
    """A tensor that a backward pass will want."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(kw_only=True)
class Record:
    """What a stage did."""

    passes: list[Pass] = field(default_factory=list)
    held: list[tuple[int, ...]] = field(default_factory=list)
    """After each forward and before each backward: of every chunk, the micro-batches of which a tensor is saved."""


def watch(record: Record, virtual: int, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """megatron's forward_step and backward_step, written down."""
    outputs: list[tuple[Tensor, int, int]] = []
    saved: dict[tuple[int, int], weakref.WeakSet[Saved]] = {}

    def look() -> None:
        alive = [chunk for (_, chunk), tensors in saved.items() if len(tensors)]
        record.held.append(tuple(alive.count(chunk) for chunk in range(virtual)))

    def forward_step(*args: Any, **named: Any) -> Any:
        micro, chunk = named["current_microbatch"], named.get("vp_stage") or 0
        tensors = saved[micro, chunk] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Saved:
            kept = Saved(tensor)
            tensors.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            output, tokens = forward(*args, **named)
        outputs.append((output, micro, chunk))
        record.passes.append(Pass(True, micro, chunk))
        look()
        return output, tokens

    def backward_step(given: Any, output: Tensor, *rest: Any, **named: Any) -> Any:
        ((micro, chunk),) = [(micro, chunk) for known, micro, chunk in outputs if known is output]
        outputs[:] = [entry for entry in outputs if entry[0] is not output]
        record.passes.append(Pass(False, micro, chunk))
        look()
        return backward(given, output, *rest, **named)

    return forward_step, backward_step


def scheduled(virtual: int, micro: int) -> Record:
    """One step of a tiny model on two stages."""
    from megatron.core.pipeline_parallel import schedules

    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    parallel = ParallelConfig(pipeline=2, virtual=virtual)
    cfg = tiny.tiny_model()
    record = Record()
    own = schedules.forward_step, schedules.backward_step
    with device.adapter():
        groups.start(parallel, seed=0)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        optim.freeze(chunks, optim.part_rates(OptimConfig(projector_lr=1e-2, language_lr=1e-2)))
        model = optim.wrap(chunks, parallel)
        step.prepare_model(model)
        rows = [model_batch(r, cfg, image_token=tiny.IMAGE, device=device.device()) for r in tiny.rows(micro)]
        schedules.forward_step, schedules.backward_step = watch(record, virtual, *own)
        try:
            step.run_schedule(model, rows)
        finally:
            schedules.forward_step, schedules.backward_step = own
    return record


def scheduled_all() -> list[Record]:
    return [scheduled(*case) for case in CASES]


def test_the_simulated_order_is_the_one_that_runs() -> None:
    for stage, records in enumerate(run_ranks(scheduled_all, 2)):
        for (virtual, micro), record in zip(CASES, records, strict=True):
            simulated = order(stage, 2, virtual, micro)
            assert record.passes == simulated, (stage, virtual, micro)
            assert record.held == held(simulated, virtual), (stage, virtual, micro)
            most = simulate([[1.0] * virtual] * 2, [[2.0] * virtual] * 2, micro).in_flight[stage]
            assert max(map(sum, record.held)) == most, (stage, virtual, micro)
