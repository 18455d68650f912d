"""One process of a trial: a step of training under a layout, its loss and its gradients beside the witness's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_nemo.check.made import Subject, packed_rows, padded_rows
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch

WITNESS = "witness.safetensors"
GATE = 0.5
RATE = 1e-2
"""Of the parts that learn: one update moves the loss visibly."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared with the witness."""

    name: str
    rows: str
    """padded: a sample a row; packed; double: two packed rows in a micro-batch"""
    parallel: ParallelConfig


@dataclass(kw_only=True)
class Outcome:
    """What a rank has to say about a case. Losses are the whole job's, a supervised token."""

    loss: float
    later: float
    """The same rows after one update."""
    norm: float
    largest: dict[str, float] = field(default_factory=dict)
    """Module -> largest gradient; of the witness."""
    off: dict[str, float] = field(default_factory=dict)
    """Module -> largest difference of this rank's gradients from the witness's."""


def trials(subject: Subject, cases: Sequence[Case], folder: str) -> list[Outcome]:
    """On each of as many processes as the cases take. The witness comes first where there is one process, and leaves
    its gradients in `folder`."""
    samples = subject.samples()
    patch, pad = subject.model.vision.patch_size, subject.pad_id
    rows = {
        "padded": padded_rows(samples, pad, patch),
        "packed": packed_rows(samples, pad, patch),
        "double": packed_rows(samples, pad, patch, rows_at_once=2),
    }
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        found = [trial(subject, case, rows[case.rows], Path(folder) / WITNESS) for case in cases]
        groups.stop()
    return found


def trial(subject: Subject, case: Case, rows: Sequence[PackedBatch], witness: Path) -> Outcome:
    """Two steps on the same rows; the first one's gradients are compared with those in `witness`, or written there."""
    cfg, rates = subject.model, trial_rates(subject.optim)
    ranks = groups.lay_out(case.parallel, seed=0)
    chunks = build_model(cfg, case.parallel, "fp32", seed=0)
    open_gates(chunks)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, case.parallel)
    optimizer = optim.build_optimizer(rates, case.parallel, "fp32", model)
    step.prepare_model(model)
    optim.set_rates(optimizer, rates, 1, 2)
    mine = rows[ranks.data_rank :: ranks.data]
    places = {"context": (ranks.context_rank, ranks.context), "sharing": chunks[0].image_place}
    batches = [model_batch(row, cfg, image_token=subject.image_id, device=device.device(), **places) for row in mine]
    losses, norms = [], []
    largest: dict[str, float] = {}
    off: dict[str, float] = {}
    for number in range(2):
        result = step.train_step(model, optimizer, batches, rates.clip_grad)
        speaks = ranks.last_stage and ranks.tensor_rank == 0
        total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
        losses.append(total / count)
        norms.append(result.grad_norm)
        if number == 0:
            gather_gradients(model)
            if witness.exists():
                off = compared(chunks, witness)
            else:
                largest = written(chunks, witness)
    return Outcome(loss=losses[0], later=losses[1], norm=norms[0], largest=largest, off=off)


def open_gates(chunks: Sequence[VLM]) -> None:
    """A fresh model's gates are shut, and nothing behind them would show."""
    with torch.no_grad():
        for local in local_parameters(chunks):
            if local.boxes[0].key.endswith("_gate"):
                local.parameter.fill_(GATE)


def trial_rates(cfg: OptimConfig) -> OptimConfig:
    """The recipe's frozen parts, its Adam; one rate, and gradients that are not clipped, as they are compared."""

    def rate(own: float | None) -> float | None:
        return None if own is None else RATE

    return replace(
        cfg,
        lr=RATE,
        vision_lr=rate(cfg.vision_lr),
        projector_lr=rate(cfg.projector_lr),
        language_lr=rate(cfg.language_lr),
        warmup_steps=0,
        min_lr_ratio=1.0,
        clip_grad=0.0,
        eps=1e-6,
    )


def gather_gradients(model: Sequence[DistributedDataParallel]) -> None:
    """Under the distributed optimizer every data rank has the sum of its share only: fill in the others'."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                shares = bucket.grad_data.view(dist.get_world_size(group), -1)
                own = shares[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def written(chunks: Sequence[VLM], path: Path) -> dict[str, float]:
    """Leave the gradients of a whole model in a file; module -> the largest."""
    gradients: dict[str, Tensor] = {}
    largest: dict[str, float] = {}
    for local in local_parameters(chunks):
        if not local.parameter.requires_grad:
            continue
        for box, piece in local.pieces(local.parameter.main_grad):
            whole = gradients.setdefault(box.key, torch.zeros(box.global_shape))
            whole[box.slices] = piece
            module = module_of(box.key)
            largest[module] = max(largest.get(module, 0.0), float(piece.abs().max()))
    save_file(gradients, path)
    return largest


def compared(chunks: Sequence[VLM], path: Path) -> dict[str, float]:
    """Module -> the largest difference of what this rank holds; copies that should be equal are each compared."""
    off: dict[str, float] = {}
    with safe_open(path, "pt") as file:
        for local in local_parameters(chunks):
            if not local.parameter.requires_grad:
                continue
            for box, piece in local.pieces(local.parameter.main_grad):
                difference = (piece - file.get_tensor(box.key)[box.slices]).abs().max()
                module = module_of(box.key)
                found = off.get(module, 0.0)
                off[module] = float(difference) if not float(difference) <= found else found
    return off


LANGUAGE = {
    "embedding": "embedding",
    "output_layer": "head",
    "self_attention": "attention",
    "cross_attention": "attention",
    "mlp": "mlp",
}
"""A word of a parameter's name -> what it is called in the table."""


def module_of(name: str) -> str:
    """language.decoder.layers.0.mlp.linear_fc1.weight -> mlp; vision.… -> vision"""
    part, _, rest = name.partition(".")
    if part != "language":
        return part
    words = rest.split(".")
    if any("norm" in word for word in words):
        return "norms"
    return next((LANGUAGE[word] for word in words if word in LANGUAGE), "language")
