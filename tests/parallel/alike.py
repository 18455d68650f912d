"""Layouts beside one process: every loss and gradient norm of some steps, and the first step's gradients by module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch

STEPS = 5
ALL = dict(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
STAGE1 = dict(projector_lr=2e-2)
STAGE2 = dict(projector_lr=1e-2, language_lr=5e-3)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained."""

    model: ModelConfig
    rows: Callable[[int], list[PackedBatch]]
    """Of a step, over all ranks."""
    rates: dict[str, float] = field(default_factory=lambda: dict(ALL))
    silent: tuple[str, ...] = ()
    """Modules whose gradients are zero: these rows say nothing about them."""


@dataclass(kw_only=True)
class Run:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    off: dict[str, float] = field(default_factory=dict)
    """Module -> largest difference of a gradient from one process's; of one process itself, the largest gradient."""


def train(task: Task, parallel: ParallelConfig, witness: Path) -> Run:
    """Some steps; the first one's gradients are compared with those in `witness`, or written there."""
    from vlm_nemo.check import trial
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg, rates = task.model, OptimConfig(**task.rates, weight_decay=0.1, clip_grad=1.0)  # type: ignore[arg-type]
    ranks = groups.lay_out(parallel, seed=0)
    chunks = build_model(cfg, parallel, "fp32", seed=0)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("_gate"):  # they start at zero, where the image has no say
                torch.nn.init.constant_(parameter, 0.6)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
    step.prepare_model(model)
    run = Run()
    places = {"context": (ranks.context_rank, ranks.context), "sharing": chunks[0].image_place}
    update = step.update

    def looking(*given: Any) -> Any:
        """Before the gradients are clipped."""
        if not run.losses:
            trial.gather_gradients(model)
            run.off = trial.compared(chunks, witness) if witness.exists() else trial.written(chunks, witness)
        return update(*given)

    step.update = looking  # type: ignore[assignment]
    try:
        for number in range(1, STEPS + 1):
            mine = task.rows(number)[ranks.data_rank :: ranks.data]
            batches = [model_batch(r, cfg, image_token=tiny.IMAGE, device=device.device(), **places) for r in mine]
            optim.set_rates(optimizer, rates, number, STEPS)
            result = step.train_step(model, optimizer, batches, rates.clip_grad)
            speaks = ranks.last_stage and ranks.tensor_rank == 0
            total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            run.losses.append(total / count)
            run.norms.append(result.grad_norm)
    finally:
        step.update = update  # type: ignore[assignment]
    return run


def train_all(tasks: dict[str, Task], cases: Sequence[tuple[str, dict[str, Any]]], folder: Path) -> list[Run]:
    from vlm_nemo.runtime import device, groups

    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for name, layout in cases:
            parallel = ParallelConfig(**({"distributed_optimizer": False} | layout))
            try:
                found.append(train(tasks[name], parallel, folder / f"{name}.safetensors"))
            except Exception as error:
                error.add_note(f"{name}: {layout}")
                raise
        groups.stop()
    return found


def assert_alike(tasks: dict[str, Task], cases: Sequence[tuple[str, dict[str, Any]]], world: int, folder: Path) -> None:
    """cases: (task, layout). Losses within 1e-5, gradients within 1e-4 of their module's largest."""
    names = list(dict.fromkeys(name for name, _ in cases))
    truths = dict(zip(names, run_ranks(train_all, 1, tasks, [(name, {}) for name in names], folder)[0], strict=True))
    for rank in run_ranks(train_all, world, tasks, cases, folder):
        for (name, layout), run in zip(cases, rank, strict=True):
            truth = truths[name]
            assert run.losses == pytest.approx(truth.losses, rel=1e-5), (name, layout)
            assert run.norms == pytest.approx(truth.norms, rel=1e-5), (name, layout)
            for module, off in run.off.items():
                assert off <= 1e-4 * truth.off[module], (name, layout, module)
    for name, truth in truths.items():
        assert len(set(truth.losses)) == STEPS, f"{name}: the witness itself must move"
        moved = {module for module, largest in truth.off.items() if largest > 0}
        assert moved == set(truth.off) - set(tasks[name].silent), f"{name}: {truth.off}"
