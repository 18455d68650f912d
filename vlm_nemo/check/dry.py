"""Dry: one real step of training on the recipe's own data, by a twin that is small but reads every token and patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from vlm_nemo.check.report import Finding, Table
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.sources import open_sources
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.twin import twin
from vlm_nemo.model.vlm import PARTS, VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.processes import CPU, RankFailed, run_ranks
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.origin import check_vocabulary
from vlm_nemo.types import IGNORE_INDEX

TIMEOUT = 1200.0
ROWS = 2
"""Micro-batches of one row."""
LOGITS = 2**29
"""Numbers in the logits of a row at most: three or four tensors of so many are alive at once."""


@dataclass(kw_only=True)
class PartSeen:
    """One part of the model after the step."""

    trained: bool
    parameters: int
    largest: float = 0.0
    """Of its gradients; 0 where it has none."""
    finite: bool = True
    moved: bool = False
    """Whether the update changed it."""


@dataclass(kw_only=True)
class Step:
    """What the step did."""

    loss: float
    counted: int
    """Tokens that the loss was taken over."""
    supervised: int
    """Labels of the rows."""
    norm: float
    applied: bool
    rows: int
    capacity: int
    samples: int
    images: int
    dropped: list[str]
    parts: dict[str, PartSeen] = field(default_factory=dict)


def reader(cfg: ModelConfig) -> ModelConfig:
    """A twin that takes the recipe's very rows: its vocabulary, image sizes, layout and reduction; tiny otherwise."""
    small = twin(cfg)
    seen = cfg.vision
    return replace(
        small,
        layout=cfg.layout,
        vision=replace(
            small.vision, image_size=seen.image_size, patch_size=seen.patch_size, window=seen.window, tiles=seen.tiles
        ),
        projector=replace(small.projector, num_queries=cfg.projector.num_queries),
        language=replace(small.language, vocab_size=cfg.language.vocab_size, max_positions=cfg.language.max_positions),
    )


def dry(model: ModelConfig, data: DataConfig, optimizer: OptimConfig, *, seed: int) -> Finding:
    """Run it in a process of its own. model: the recipe's, not its twin."""
    try:
        (done,) = run_ranks(one_step, 1, model, data, optimizer, seed, timeout=TIMEOUT, environment=CPU)
    except RankFailed as error:
        return Finding(part="dry", ok=False, verdict=str(error).strip().splitlines()[-1], notes=[str(error)])
    return judged(done, data)


def one_step(model: ModelConfig, data: DataConfig, optimizer: OptimConfig, seed: int) -> Step:
    """Sources to rows, rows through the model, gradients, one update."""
    cfg, parallel = reader(model), ParallelConfig()
    tokenizer = Tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, cfg)
    data = shortened(data, cfg, seed)
    loader = Loader(
        data, spec_of(cfg), tokenizer, seed=seed, max_tokens=cfg.language.max_positions, dp_rank=0, dp_size=1
    )
    try:
        read = loader.next()
    finally:
        loader.close()
    with device.adapter():
        groups.start(parallel, seed)
        chunks = build_model(cfg, parallel, "fp32", seed)
        optim.freeze(chunks, optim.part_rates(optimizer))
        wrapped = optim.wrap(chunks, parallel)
        updater = optim.build_optimizer(optimizer, parallel, "fp32", wrapped)
        step.prepare_model(wrapped)
        at_peak = replace(optimizer, warmup_steps=0, min_lr_ratio=1.0)  # a schedule's own last step may be of rate 0
        optim.set_rates(updater, at_peak, 1, 1)
        before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
        batches = [
            model_batch(row, cfg, image_token=tokenizer.image_id, device=device.device()) for row in read.batches
        ]
        result = step.train_step(wrapped, updater, batches, optimizer.clip_grad)
        parts = looked_at(chunks[0], before)
        groups.stop()
    return Step(
        loss=result.loss_sum / result.loss_tokens if result.loss_tokens else math.nan,
        counted=int(result.loss_tokens),
        supervised=sum(int((row.labels != IGNORE_INDEX).sum()) for row in read.batches),
        norm=result.grad_norm,
        applied=result.applied,
        rows=len(read.batches),
        capacity=data.pack.capacity,
        samples=sum(row.samples for row in read.batches),
        images=sum(row.images.count for row in read.batches),
        dropped=_dropped(read),
        parts=parts,
    )


def shortened(data: DataConfig, cfg: ModelConfig, seed: int) -> DataConfig:
    """Few rows; and shorter ones where a large vocabulary's logits would not fit here, but no shorter than a sample."""
    data = replace(data, global_packs=ROWS, micro_packs=1, prefetch=1)
    room = LOGITS // cfg.language.vocab_size // 64 * 64
    if room >= data.pack.capacity:
        return data
    first = (
        open_sources(data, spec_of(cfg), Tokenizer(data.tokenizer), seed=seed)
        .planner(cfg.language.max_positions)
        .step(ROWS)
    )
    longest = max(sample.length for row in first.rows for sample in row)
    capacity = min(data.pack.capacity, max(room, -(-longest // 64) * 64))
    return replace(data, pack=replace(data.pack, capacity=capacity))


def looked_at(model: VLM, before: dict[str, torch.Tensor]) -> dict[str, PartSeen]:
    """Gradients and changes by part. before: the weights before the step."""
    parts: dict[str, PartSeen] = {}
    for name, parameter in model.named_parameters():
        part = parts.setdefault(name.split(".", 1)[0], PartSeen(trained=False, parameters=0))
        part.parameters += parameter.numel()
        part.moved |= not torch.equal(parameter, before[name])
        if parameter.requires_grad:
            part.trained = True
            gradient = parameter.main_grad
            part.finite &= bool(gradient.isfinite().all())
            part.largest = max(part.largest, float(gradient.abs().max()))
    return {name: parts[name] for name in PARTS if name in parts}


def judged(done: Step, data: DataConfig) -> Finding:
    """Table and verdict."""
    faults = list(_faults(done))
    table = Table(
        title="after one step",
        columns=("part", "trained", "parameters", "largest gradient", "changed"),
        rows=[
            (
                name,
                "yes" if part.trained else "frozen",
                f"{part.parameters:,}",
                f"{part.largest:.1e}" if part.trained else "-",
                "yes" if part.moved else "no",
            )
            for name, part in done.parts.items()
        ],
        bad=frozenset(i for i, (name, part) in enumerate(done.parts.items()) if _fault(name, part, done.images)),
    )
    what = f"{done.samples} samples with {done.images} images"
    verdict = f"loss {done.loss:.3f} over {done.counted:,} supervised tokens of {what}; gradient norm {done.norm:.2g}"
    if faults:
        verdict = faults[0]
    notes = [f"a twin of the model with the whole vocabulary, {done.rows} rows of {done.capacity} tokens"]
    if done.capacity < data.pack.capacity:
        notes.append(f"rows are shorter than data.pack.capacity={data.pack.capacity}, so that the logits fit here")
    if not done.images:
        notes.append("no sample of these rows has an image: vision and projector had nothing to learn from")
    notes += [f"left out: {name}" for name in done.dropped]
    return Finding(
        part="dry",
        ok=not faults,
        verdict=verdict,
        tables=[table],
        notes=[*notes, *faults[1:]],
        data={
            "loss": done.loss,
            "supervised": done.supervised,
            "gradient_norm": done.norm,
            "samples": done.samples,
            "images": done.images,
        },
    )


def _faults(done: Step) -> Sequence[str]:
    faults = []
    if not math.isfinite(done.loss):
        faults.append(f"the loss is {done.loss}")
    if done.counted != done.supervised:
        faults.append(f"the loss is over {done.counted:,} tokens, the rows have {done.supervised:,} labels")
    if not done.supervised:
        faults.append("the rows have no label")
    if not done.applied:
        faults.append(f"the update was skipped: gradient norm {done.norm}")
    faults += [fault for name, part in done.parts.items() if (fault := _fault(name, part, done.images))]
    return faults


def _fault(name: str, part: PartSeen, images: int) -> str:
    if not part.trained:
        return f"{name} is frozen and changed" if part.moved else ""
    if not part.finite:
        return f"the gradient of {name} is not finite"
    if not images and name != "language":
        return ""
    if part.largest == 0:
        return f"{name} is to learn and its gradient is zero"
    return "" if part.moved else f"{name} is to learn and the update did not change it"


def _dropped(read: StepData) -> list[str]:
    return [f"{drop.key} of {drop.source}: {drop.reason}" for drop in (*read.planned_drops, *read.local_drops)]
