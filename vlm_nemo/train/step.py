"""One training step: the loss, the micro-batches through megatron's schedule, the update. The file to read first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.experts import take_losses
from vlm_nemo.train.optim import update


def token_loss(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [1, T] of every position -> (sum over supervised tokens, their number, [sum, number] for the report).

    The sum is not divided here. megatron adds sums and counts over micro-batches and data ranks and divides the
    gradients once by the global count, so no split of the same data changes them.
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    # The schedule scales `total` in place; the report must not follow it.
    return total, count.to(torch.int), torch.stack((total.detach().clone(), count))


def forward_step(rows: Iterator[ModelBatch], model: nn.Module) -> tuple[Tensor, Any]:
    """What megatron's schedules call for every micro-batch."""
    batch = next(rows)
    return model(batch), partial(token_loss, loss_mask=batch.loss_mask)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss_sum: float
    """Over this replica's supervised tokens; 0 except on the last pipeline stage."""
    loss_tokens: float
    grad_norm: float
    applied: bool
    router_losses: tuple[float, float] = (0.0, 0.0)
    """Balance and z loss (model/balance.py) of this rank's tokens and sparse layers, unweighted, summed over supervised
    tokens. They are no part of loss_sum; all ranks' together are the job's."""


def prepare_model(model: Sequence[nn.Module]) -> None:
    """Tell megatron's schedule how to finish a step's gradients. Once, after wrapping."""
    for chunk in model:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = None


def train_step(
    model: list[nn.Module], optimizer: MegatronOptimizer, rows: Sequence[ModelBatch], clip: float
) -> StepResult:
    """Forward and backward over this rank's rows (micro-batches of one packed row), then one update."""
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = run_schedule(model, rows)
    norm, applied = update(optimizer, clip)
    loss_sum, loss_tokens = torch.stack(reports).sum(0).tolist() if reports else (0.0, 0.0)
    told = take_losses(model)
    balance, z = told.tolist() if told is not None else (0.0, 0.0)
    return StepResult(
        loss_sum=loss_sum, loss_tokens=loss_tokens, grad_norm=norm, applied=applied, router_losses=(balance, z)
    )


def run_schedule(model: Sequence[nn.Module], rows: Sequence[ModelBatch], *, forward_only: bool = False) -> list[Tensor]:
    """megatron's schedule for the layout: no pipeline, 1F1B, or interleaved. Returns the last stage's reports."""
    iterators = [iter(rows) for _ in model]  # every virtual chunk walks the same rows
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(rows),
        seq_length=rows[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
