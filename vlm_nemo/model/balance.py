"""How evenly experts are used, a sample at a time, so that no packing and no split of a batch changes it. Pure.

A sample of n tokens sends the share f_i of its choices to expert i (of E), whose mean probability in it is P_i. Its
balance loss is E x sum_i f_i P_i: 1 where all are used alike, E where one gets everything. It is Switch Transformer's
loss (arXiv 2101.03961), counted in each sample as DeepSeek-V3 does (arXiv 2412.19437, eq. 17 to 20) instead of in each
micro-batch: f_i of a micro-batch would make the gradient depend on what else is in it. A sample's loss counts as often
as it has supervised tokens, like its other loss; padding counts nowhere.

    row        a a a b b b b pad      a has 2 supervised tokens, b has 1
    sample     0 0 0 1 1 1 1 2
    weight     2/3 x3, 1/4 x4, 0      what is summed over the tokens, and in the end divided by the job's 3
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Of a row of T tokens in S segments, the padding included."""

    sample: Tensor
    """[T] int64: the segment of every token"""
    weight: Tensor
    """[T] float32: its segment's supervised tokens over its length; 0 for padding"""
    segments: int
    """S"""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Balance:
        """The same, every tensor through `move`: to another place, or to a part of the row's tokens."""
        return replace(self, sample=move(self.sample), weight=move(self.weight))


def make_balance(cu_seqlens: Tensor, supervised: Tensor) -> Balance:
    """cu_seqlens: [S+1] from 0 to T; supervised: [S] labels of every segment that take part in the loss."""
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths))
    weight = supervised.float() / lengths.clamp(min=1)
    return Balance(
        sample=numbers.repeat_interleave(lengths),
        weight=weight.repeat_interleave(lengths),
        segments=len(lengths),
    )


def counted(chosen: Tensor, balance: Balance) -> Tensor:
    """chosen: [T, E] bool -> [S, E] float32: how often each segment chose each expert."""
    counts = chosen.new_zeros(balance.segments, chosen.shape[1], dtype=torch.float32)
    return counts.index_add_(0, balance.sample, chosen.float())


def balance_losses(logits: Tensor, counts: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
    """(balance loss, z loss), each summed over the supervised tokens that these tokens stand for.

    logits: [T, E] float32, the router's scores; counts: [S, E] of whole segments, wherever their tokens are. The z loss
    is the mean square of a sample's log-sum-exp (ST-MoE, arXiv 2202.08906).
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    even = logits.shape[1] * (F.softmax(logits, dim=1) * shares[balance.sample]).sum(1)
    return (balance.weight * even).sum(), (balance.weight * logits.logsumexp(1).square()).sum()
