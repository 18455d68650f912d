"""The head and its loss, of supervised tokens only. Logits are made a chunk of tokens at a time and never kept.

    hidden [T, D] -> those of the S supervised tokens -> chunks of rows -> logits [rows, V] -> losses, gradients -> gone

A chunk's gradients are computed beside its losses, from the logits that are there already, as Liger's and Apple's cut
cross entropy do it: a head costs one forward and one backward product of S tokens, and memory for one chunk. That is
what the gradient of the losses' sum needs. Where someone asks for another gradient (a loss of his own for each token),
the chunks are made once more with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from vlm_nemo.runtime.fusion import fused
from vlm_nemo.types import IGNORE_INDEX

CHUNK = 2**26
"""Logits of a chunk on a rank: 256 MiB in fp32, tokens enough to keep a large matrix product busy."""


class Targets(NamedTuple):
    """What a row is trained on. There is always a token, so that every rank runs the same collectives and brings
    gradients to them; where none has a label, that one weighs nothing."""

    rows: Tensor
    """[S] int64: the tokens that have a label, in order; counted in the row as this tensor group holds it"""
    labels: Tensor
    """[S] int64"""
    weights: Tensor
    """[S] float32: 1, or 0 for the stand-in"""


def targets_of(labels: Tensor) -> Targets:
    """labels: [T] int64 on the CPU, IGNORE_INDEX where the loss does not look."""
    rows = (labels != IGNORE_INDEX).nonzero().flatten()
    if not len(rows):
        return Targets(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    return Targets(rows, labels[rows], torch.ones(len(rows)))


class Head(ColumnParallelLinear):
    """megatron's output layer, which makes losses where it is given targets.

    A module's own call, not a function of its weight: under parallel.overlap_param_gather that call waits for it.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        targets: Targets | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, D] (this rank's part of it under sequence parallelism) -> logits [T, 1, V], as megatron makes them; or
        with targets the weighted losses [S], fp32, the same on every tensor rank. The None is megatron's bias."""
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        x = _Pick.apply(input_.squeeze(1), targets.rows)
        if self.allreduce_dgrad:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        weight = self.weight if weight is None else weight
        return token_losses(x, weight, targets.labels, targets.weights, self.tp_group), None


def token_losses(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, group: Any) -> Tensor:
    """Weight times cross entropy of every token, [S] fp32.

    x: [S, D]; weight: [V / ranks, D], this tensor rank's rows of the head; labels: [S], of the whole vocabulary. The
    gradient of x is this rank's part of a sum over the group.
    """
    return _Losses.apply(x, weight, labels, weights, group, torch.is_grad_enabled())


class _Pick(torch.autograd.Function):
    """x[rows] where no row comes twice: the gradient is written to its place, not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, grad.shape[1]).index_copy_(0, rows, grad), None


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, group: Any, training: bool
    ) -> Tensor:
        ctx.wanted = tuple(training and needed for needed in ctx.needs_input_grad[:2])
        losses, ctx.dx, ctx.dw = _sweep(x, weight, labels, weights, group, *ctx.wanted)
        ctx.save_for_backward(x, weight, labels, weights)
        ctx.group = group
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, weight, labels, weights = ctx.saved_tensors
        dx, dw, ctx.dx, ctx.dw = ctx.dx, ctx.dw, None, None
        # The gradient of a sum is one number for all tokens; autograd hands it in as such, so no look at it is needed
        if grad.stride() == (0,) and (dx is not None or dw is not None):
            for made in (dx, dw):
                if made is not None:
                    made.mul_(grad[0])
        else:
            _, dx, dw = _sweep(x, weight, labels, weights * grad, ctx.group, *ctx.wanted)
        return dx, dw, None, None, None, None


def _sweep(
    x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, group: Any, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Chunk by chunk: weighted losses [S], and the gradients of their sum, of x and of weight, where wanted."""
    chunks = -(-len(x) // max(1, CHUNK // len(weight)))
    rows = -(-len(x) // chunks)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if want_x else None
    dw: Tensor | None = None
    local = labels - len(weight) * group.rank()
    for first in range(0, len(x), rows):
        cut = slice(first, first + rows)
        found, slopes = _cross_entropy(x[cut] @ weight.t(), local[cut], weights[cut], group, want_x or want_weight)
        losses[cut] = found
        if slopes is None:
            continue
        if dx is not None:
            torch.mm(slopes, weight, out=dx[cut])
        if want_weight:
            if dw is None:
                dw = slopes.t() @ x[cut]
            else:
                torch.addmm(dw, slopes.t(), x[cut], out=dw)
        del slopes  # before the next chunk's logits are made
    return losses, dx, dw


def _cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, group: Any, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted losses [rows] in fp32; and what they rise by with each of this rank's logits, in theirs, if asked for.

    logits: [rows, V / ranks], written over; labels: [rows], counted from this rank's first word.
    """
    own = (labels >= 0) & (labels < logits.shape[1])
    at = labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    dtype = logits.dtype
    x, top, total, picked = _exponentials(logits, at)
    del logits
    picked = picked * own
    scale = 1 / total
    if group.size() > 1:
        mine = torch.stack((top, total, picked))
        every = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather_into_tensor(every.view(-1, mine.shape[1]), mine, group=group)
        tops, totals, pickeds = every.unbind(1)
        highest = tops.amax(0)
        total, picked = (totals * (tops - highest).exp()).sum(0), pickeds.sum(0)
        scale, top = (top - highest).exp() / total, highest
    losses = (top + total.log() - picked) * weights
    scale, label = ((x * weights).unsqueeze(1) for x in (scale, own))
    return losses, _slopes(x, at, scale, label, dtype) if slopes else None


@fused
def _exponentials(logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(logits - top) [rows, V / ranks] in fp32, in place where logits are; top, their sum, and the logit at `at`."""
    x = logits.float()
    picked, top = x.gather(1, at).squeeze(1), x.amax(1)
    x = x.sub_(top.unsqueeze(1)).exp_()
    return x, top, x.sum(1), picked


@fused
def _slopes(x: Tensor, at: Tensor, scale: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale, and label less at `at`; x [rows, V / ranks] is written over, the others are [rows, 1]."""
    there = x.gather(1, at) * scale - label
    return x.mul_(scale).to(dtype).scatter_(1, at, there.to(dtype))
