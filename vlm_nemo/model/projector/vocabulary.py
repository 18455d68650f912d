"""Ovis: a patch becomes probabilities of visual words, and the mean of those words' embeddings, so weighted.

The words are split over the tensor group. The last few are indicators (an image's start, end, rows): the scores know
nothing of them, so they never get probability; their embeddings stand where the layout says.

    words        0 1 2 3 | 4 5 6 7        two ranks, two indicators (6 and 7)
    scores       0 1 2 3 | 4 5
    embeddings   0 1 2 3 | 4 5 6 7
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.model.boxes import split_rows
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.projector.base import Projector, divides, projector_config
from vlm_nemo.model.transformer import sum_over_ranks
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


class VisualVocabulary(Projector):
    """[N', D'] -> [N', D_language]: linear, LayerNorm over the words, probabilities, their mean embedding."""

    def __init__(self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        own = cfg.projector
        divides(parallel, projector__vocabulary=own.vocabulary)
        share = own.vocabulary // parallel.tensor
        if not 0 <= own.indicators < share:
            raise UserError(
                f"model.projector.indicators={own.indicators} must be fewer than the {share} visual words of a tensor "
                f"rank (model.projector.vocabulary={own.vocabulary} over parallel.tensor={parallel.tensor})"
            )
        width = cfg.language.hidden_size
        super().__init__(cfg, projector_config(cfg, parallel, dtype, width=width, inner=width, heads=parallel.tensor))
        self.own = own
        self.words = own.vocabulary - own.indicators
        self.rank, self.ranks = dist.get_rank(groups.vision_group()), parallel.tensor
        self.first = self.rank * share
        mine = min(share, self.words - self.first)
        self.head = WordRows(self.first, self.words, dtype, weight=(mine, self.width_in))
        self.norm = WordRows(self.first, self.words, dtype, weight=(mine,), bias=(mine,))
        self.table = WordRows(self.first, own.vocabulary, dtype, weight=(share, width))

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        probabilities = self.probabilities(features).to(self.table.weight.dtype)
        mine = probabilities @ self.table.weight[: probabilities.shape[1]]
        return reduce_from_tensor_model_parallel_region(mine, groups.vision_group())

    def probabilities(self, features: Tensor) -> Tensor:
        """[N', D'] -> [N', this rank's words] float32; over all ranks a row sums to one."""
        features = copy_to_tensor_model_parallel_region(features, groups.vision_group())
        scores = self.normalised(F.linear(features, self.head.weight).float())
        if self.own.tokenize == "gumbel" and self.training:
            scores = scores + self.noise(scores)
        scores = scores / self.own.temperature
        largest = scores.detach().amax(-1, keepdim=True)
        over_ranks(largest, dist.ReduceOp.MAX)
        exponents = (scores - largest).exp()
        soft = exponents / sum_over_ranks(exponents.sum(-1, keepdim=True))
        if self.own.tokenize == "softmax":
            return soft
        return self.chosen(scores, largest) - soft.detach() + soft

    def normalised(self, scores: Tensor) -> Tensor:
        """LayerNorm over the words of all ranks. [N', this rank's words] -> the same."""
        centred = scores - sum_over_ranks(scores.sum(-1, keepdim=True)) / self.words
        variance = sum_over_ranks(centred.square().sum(-1, keepdim=True)) / self.words
        return centred * torch.rsqrt(variance + self.own.norm_eps) * self.norm.weight + self.norm.bias

    def noise(self, scores: Tensor) -> Tensor:
        """Gumbel noise. Drawn for all words and cut, so that it does not depend on the number of ranks."""
        drawn = torch.empty(len(scores), self.words, device=scores.device).exponential_()
        return -drawn.log()[:, self.first : self.first + scores.shape[1]]

    def chosen(self, scores: Tensor, largest: Tensor) -> Tensor:
        """One at the word of the largest score, the first of several, and zeros. [N', this rank's words]"""
        words = torch.arange(self.first, self.first + scores.shape[1], device=scores.device)
        candidate = torch.where(scores == largest, words, self.words).amin(-1, keepdim=True)
        over_ranks(candidate, dist.ReduceOp.MIN)
        return (words == candidate).to(scores.dtype)

    def extra_rows(self) -> Tensor | None:
        """[indicators, D]: the last words' embeddings, which the last rank has."""
        if self.own.indicators == 0:
            return None
        last = self.table.weight[-self.own.indicators :]
        mine = last if self.rank == self.ranks - 1 else last * 0
        return reduce_from_tensor_model_parallel_region(mine, groups.vision_group())


class WordRows(nn.Module):
    """Parameters with a row a word: this rank's words, from `first` on, of `total`."""

    def __init__(self, first: int, total: int, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.total = first, total
        self.weight: nn.Parameter
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        return {
            f"{prefix}{name}": split_rows(f"{prefix}{name}", parameter, self.first, self.total)
            for name, parameter in self.named_parameters()
        }


def over_ranks(x: Tensor, op: dist.ReduceOp) -> None:
    """Reduce over the tower's tensor group, in place, without gradients."""
    dist.all_reduce(x, op=op, group=groups.vision_group())
