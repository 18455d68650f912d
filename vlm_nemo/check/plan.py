"""The plan: what every stage of a layout needs in memory and arithmetic, and how long its pipeline waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from vlm_nemo.check.advice import Knob, better_cut, first_that_fits
from vlm_nemo.check.needs import EXPERTS, StageNeeds, stage_needs
from vlm_nemo.check.report import Finding, Table
from vlm_nemo.check.sizes import FLOPS, GIB, many, told, unit_of
from vlm_nemo.check.timeline import Timeline, simulate
from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.stages import Work, chunk_layers, costs_of, once_kept, resolved, told_of_images
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import check_layout
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.optim import learns
from vlm_nemo.types import UserError

SYSTEM = "CUDA, NCCL and the allocator"
FAR = 6
"""Times the fullest rank: a limit above that is beyond the plot."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be rehearsed, on how many ranks."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: str
    optim: OptimConfig
    global_packs: int
    micro_packs: int
    capacity: int
    world: int
    batch: Callable[[ParallelConfig], ModelBatch]
    """A typical micro-batch, as the first context rank of a layout gets it."""
    work: Work
    """Rows by which pipeline stages are balanced."""

    @property
    def replicas(self) -> int:
        return self.world // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    @property
    def micro(self) -> int:
        """Micro-batches of a replica in a step."""
        return self.global_packs // (self.replicas * self.micro_packs)


def needs(job: Job) -> list[StageNeeds]:
    """Of every stage. Raises UserError for a layout that the model or the world cannot have."""
    try:
        check_layout(
            job.parallel,
            job.model,
            world_size=job.world,
            global_packs=job.global_packs,
            micro_packs=job.micro_packs,
            capacity=job.capacity,
        )
    except UserError as error:  # as training would say it, of ranks that were started
        raise UserError(f"on check.world={job.world} ranks: {error}") from None
    parallel = as_trained(job)
    batch = job.batch(parallel)
    return [
        stage_needs(
            job.model,
            parallel,
            job.precision,
            job.optim,
            lambda change: changed(batch, change),
            world=job.world,
            stage=stage,
            micro=job.micro,
        )
        for stage in range(job.parallel.pipeline)
    ]


def as_trained(job: Job) -> ParallelConfig:
    """The layout with its stages balanced, as training does it."""
    return resolved(job.model, job.parallel, learns(job.optim), job.work)


def changed(batch: ModelBatch, change: Callable[[Tensor], Tensor]) -> ModelBatch:
    """The same with every tensor through `change`."""
    values: dict[str, Any] = {}
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            values[entry.name] = change(value)
        elif value is not None:
            values[entry.name] = value.moved(change)
    return replace(batch, **values)


def timeline(stages: Sequence[StageNeeds], micro: int) -> Timeline:
    """Of a step, in FLOPs: as if every stage computed at the same rate."""
    return simulate([s.forward_flops for s in stages], [s.backward_flops for s in stages], micro)


def plan(job: Job, *, memory_gib: float, reserve_gib: float, assumed: str) -> Finding:
    """Judge a layout. assumed: what the typical micro-batch is."""
    limit = round((memory_gib - reserve_gib) * GIB)
    stages = needs(job)
    line = timeline(stages, job.micro)
    layers = chunk_layers(job.model.language.num_layers, as_trained(job))
    worst = max(stages, key=lambda s: s.peak)
    fits = worst.peak <= limit
    recomputed: list[StageNeeds] | list[None] = _with_recompute(job) or [None] * len(stages)
    peaks = [worst.peak, *(again.peak for again in recomputed if again)]
    unit = unit_of(max(peaks))  # one for all cells, so that a row's sizes add up by eye
    table = Table(
        title=f"a rank of each stage, {unit.name}; {many(job.world, 'rank')}, {many(job.replicas, 'replica')}, "
        f"{many(job.micro, 'micro-batch', 'es')}",
        columns=("stage", "parameters", "weights", "gradients", "optimizer", "activations", "peak", "with recompute"),
        rows=[
            (
                str(s.stage),
                f"{sum(s.parameters.values()) / 1e6:,.1f} M",
                *map(unit.of, (s.weights, s.gradients, s.optimizer, s.activations, s.peak)),
                unit.of(again.peak) if again else "=",
            )
            for s, again in zip(stages, recomputed, strict=True)
        ],
        bad=frozenset(i for i, s in enumerate(stages) if s.peak > limit),
    )
    sparse = job.model.language.moe.experts is not None
    carried = [
        (_tensor_bytes(s), _apart_bytes(s, "context"), s.sent.get("send", 0), s.data_sent, _apart_bytes(s, EXPERTS))
        for s in stages
    ]
    sent = unit_of(max(size for sizes in carried for size in sizes))
    done = [busy * job.parallel.tensor * job.parallel.context for busy in line.busy]
    flops = unit_of(max(done), FLOPS)
    work = Table(
        title=f"a step of one replica, {told(sum(done), FLOPS)}",
        columns=(
            *("stage", "parts", "layers", "in flight", flops.name, "share", f"tensor group {sent.name}"),
            *((f"context group {sent.name}",) if job.parallel.context > 1 else ()),
            *(f"to stages {sent.name}", f"data group {sent.name}"),
            *(("experts M", f"to experts {sent.name}") if sparse else ()),
        ),
        rows=[
            (
                str(s.stage),
                " ".join(s.parameters),
                "+".join(str(count) for count in layers[s.stage :: job.parallel.pipeline]),
                str(held),
                flops.of(computed),
                f"{computed / sum(done):.1%}",
                sent.of(tensor),
                *((sent.of(context),) if job.parallel.context > 1 else ()),
                *map(sent.of, (on, data)),
                *((f"{s.experts / 1e6:,.1f}", sent.of(tokens)) if sparse else ()),
            )
            for s, computed, held, (tensor, context, on, data, tokens) in zip(
                stages, done, line.in_flight, carried, strict=True
            )
        ],
    )
    where = f"the fullest rank (stage {worst.stage}) needs {told(worst.peak)} of {told(limit)}"
    verdict = where
    if job.parallel.pipeline > 1:
        verdict += f"; the pipeline waits {line.bubble:.1%} of its time, its busiest stage does {line.balance:.2f} x"
        costs = costs_of(job.model, job.parallel, learns(job.optim), job.work)
        verdict += f" the mean ({better_cut(costs, as_trained(job))})"
    if not fits:
        verdict = f"{where}; {_help(job, limit)}"
    return Finding(
        part="plan",
        ok=fits,
        verdict=verdict,
        tables=[table, work],
        notes=[
            assumed,
            *told_of_images(job.model, job.parallel, job.work),
            *once_kept(job.model, as_trained(job), learns(job.optim), job.work),
            f"{reserve_gib:.0f} of {memory_gib:.0f} GiB are left to {SYSTEM}",
            f"a checkpoint in the background (checkpoint.asynchronous) copies {told(_copied(job, stages))} a rank "
            "to the host's memory",
        ],
        figures=[("memory of a rank by stage", _memory(stages, limit))],
        data={
            "stages": [asdict(s) for s in stages],
            "layers": layers,
            "bubble": line.bubble,
            "balance": line.balance,
            "in_flight": line.in_flight,
            "limit": limit,
        },
    )


def _copied(job: Job, stages: Sequence[StageNeeds]) -> float:
    """Bytes of what is trained that a rank of the fullest stage writes: ranks share out what they all hold."""
    element = 2 if job.precision == "bf16" else 4
    holders = job.replicas * job.parallel.context
    whole = 1 if job.parallel.distributed_optimizer else holders
    return max(s.trained * element / holders + s.optimizer / whole for s in stages)


def _with_recompute(job: Job) -> list[StageNeeds] | None:
    again = replace(job.parallel, recompute="full")
    if job.optim.vision_lr is not None:
        again = replace(again, recompute_vision="full")
    return None if again == job.parallel else needs(replace(job, parallel=again))


def _help(job: Job, limit: int) -> str:
    def peak(parallel: ParallelConfig) -> int:
        return max(stage.peak for stage in needs(replace(job, parallel=parallel)))

    found: Knob | None = first_that_fits(job.parallel, job.world, limit, peak, job.optim.vision_lr is not None)
    if found is None:
        return "no layout of these ranks helps: use more ranks, a shorter data.pack.capacity, or freeze a part"
    return f"{' '.join(found.words)} makes it {told(found.peak)}"


def _tensor_bytes(stage: StageNeeds) -> int:
    """In forward and backward, what goes neither to another stage, nor to context ranks, nor to experts goes to the
    tensor group."""
    rest = sum(size for name, size in stage.sent.items() if name not in ("send", "recv"))
    return rest - _apart_bytes(stage, "context") - _apart_bytes(stage, EXPERTS)


def _apart_bytes(stage: StageNeeds, word: str) -> int:
    """Of collectives that are counted apart: keys and values of context ranks; tokens for experts and what these give,
    where in a rehearsal every expert gets its even share."""
    return sum(size for name, size in stage.sent.items() if name.startswith(f"{word} "))


def _memory(stages: Sequence[StageNeeds], limit: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(stages)), layout="constrained")
    largest = max(s.peak for s in stages)
    unit = unit_of(largest)
    left = [0.0] * len(stages)
    for name in ("weights", "gradients", "optimizer", "activations"):
        sizes = [getattr(s, name) / unit.size for s in stages]
        axis.barh([f"stage {s.stage}" for s in stages], sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if limit <= FAR * largest:
        axis.axvline(limit / unit.size, color="black", linestyle="--", label=f"limit {told(limit)}")
        axis.set_xlim(0, 1.05 * max(limit, largest) / unit.size)
        axis.set_xlabel(unit.name)
    else:  # its line would leave no room to the bars
        axis.set_xlim(0, 1.05 * largest / unit.size)
        axis.set_xlabel(f"{unit.name}; the limit of {told(limit)} is far to the right")
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    plt.close(figure)
    return figure
