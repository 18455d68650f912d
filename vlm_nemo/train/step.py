"""One training step: the loss, the micro-batches through megatron's schedule, the update. The file to read first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.train.optim import gradient_norm, update


def token_loss(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [S] of supervised tokens -> (their sum, their number, [sum, number] for the report).

    loss_mask: [S]: 0 for the stand-in of a row without a label, whose loss is 0.

    The sum is not divided here. megatron adds sums and counts over micro-batches and data ranks and divides the
    gradients once by the global count, so no split of the same data changes them.
    """
    total = losses.sum()
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


def prepare_model(model: Sequence[DistributedDataParallel]) -> None:
    """Tell megatron's schedule how to finish a step's gradients. Once, after wrapping."""
    # Until a chunk's last micro-batch its gradients stay here, although parallel.overlap_grad_reduce sends early
    waiting = [chunk.no_sync for chunk in model]
    for chunk in model:
        chunk.config.finalize_model_grads_func = finish_gradients
        chunk.config.grad_scale_func = None
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]


def train_step(
    model: list[nn.Module], optimizer: MegatronOptimizer, rows: Sequence[ModelBatch], clip: float
) -> StepResult:
    """Forward and backward over this rank's rows (micro-batches of one packed row), then one update.

    The host waits for the device once: for loss and gradient norm together, before the update.
    """
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = run_schedule(model, rows)
    norm = gradient_norm(optimizer)
    told = torch.stack(reports).sum(0) if reports else norm.new_zeros(2)
    loss_sum, loss_tokens, norm = torch.cat((told, norm.view(1))).tolist()
    applied = update(optimizer, norm, clip)
    return StepResult(loss_sum=loss_sum, loss_tokens=loss_tokens, grad_norm=norm, applied=applied)


def finish_gradients(model: list[nn.Module], num_tokens: Tensor, **named: Any) -> None:
    """megatron's end of a step's gradients: summed over ranks, then divided by the global number of tokens.

    megatron asks the device whether there was a token at all; that would stop the host once more. Without one the
    gradients are zero, and stay so. num_tokens: this replica's, known on the last stage.
    """
    finalize_model_grads(model, None, **named)
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    share = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(share)


def run_schedule(model: Sequence[nn.Module], rows: Sequence[ModelBatch], *, forward_only: bool = False) -> list[Tensor]:
    """megatron's schedule for the layout: no pipeline, 1F1B, or interleaved. Returns the last stage's reports."""
    iterators = [iter(rows) for _ in model]  # every virtual chunk walks the same rows
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(rows),
        seq_length=rows[0].tokens.shape[1] * model[0].config.context_parallel_size,  # of the whole row
        micro_batch_size=1,
        forward_only=forward_only,
    )
