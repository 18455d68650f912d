"""One row's images shared out over ranks that each hold the whole tower: who takes which views, and all embeddings
together again.

Three ranks, four views that give 4, 4, 2 and 2 embeddings:

    rank 0   view 0            0 0 0 0
    rank 1   view 1            1 1 1 1
    rank 2   views 2 and 3     2 2 3 3
    gathered, on every rank    0 0 0 0 | 1 1 1 1 | 2 2 3 3

Every rank hands in as many rows as the one with most has, and one without a view runs a blank one, so that all run the
same collectives whatever a row holds.

A parameter of the tower is on every rank and sees other images on each, so its gradient is the sum over them. What
comes back from the decoder is the same on every rank: the gather's gradient is this rank's rows of it times the number
of ranks, and when a step's gradients are finished, megatron averages those that `boxes.mark_shared` marks over the
tensor group. What each rank computes alike (an extra row of the projector) is averaged too, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import view_flops
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.views import Grid, blank_view

Place = tuple[int, int]
"""A rank among those that share images, and how many these are."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Where all embeddings of a row lie once every rank has handed in its own."""

    most: int
    """Embeddings of the rank that has most."""
    order: Tensor
    """[E] int64: which of the ranks * most gathered rows is each embedding of the row."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Share:
        """The same, its tensor through `move`."""
        return Share(most=self.most, order=move(self.order))


def dealt(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which of these each rank takes: the dearest first, each to the rank with least (LPT: at most 4/3 of the best).

    ([9, 1, 5, 5], 2) -> [[0, 1], [2, 3]]
    """
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for view in sorted(range(len(costs)), key=lambda view: -costs[view]):
        rank = min(range(ranks), key=lambda rank: loads[rank])
        taken[rank].append(view)
        loads[rank] += costs[view]
    return [sorted(views) for views in taken]


def view_costs(cfg: ModelConfig, grids: Sequence[Grid]) -> list[float]:
    """FLOPs of each view."""
    known = {grid: view_flops(cfg, grid) for grid in set(grids)}
    return [known[grid] for grid in grids]


def uneven(cfg: ModelConfig, rows: Iterable[Sequence[Grid]], ranks: int) -> float:
    """How much longer the busiest rank takes than if all had equal shares, over rows of such views; at least 1."""
    busiest = total = 0.0
    for grids in rows:
        costs = view_costs(cfg, grids)
        busiest += max(sum(costs[view] for view in views) for views in dealt(costs, ranks))
        total += sum(costs)
    return busiest * ranks / total if total else 1.0


def share_views(
    patches: Tensor, grids: Sequence[Grid], cfg: ModelConfig, place: Place
) -> tuple[Tensor, list[Grid], Share]:
    """This rank's views of a row, or a blank one; and where everyone's embeddings go. Every rank plans the same.

    patches: [P, p*p*3] of all views; on the CPU.
    """
    rank, ranks = place
    spec = spec_of(cfg)
    counts = [view_tokens(spec, grid) for grid in grids]
    taken = dealt(view_costs(cfg, grids), ranks)
    blank, blank_grids = blank_view(cfg.vision, spec.factor)
    (blank_grid,) = ((int(h), int(w)) for h, w in blank_grids.tolist())
    most = max(sum(counts[view] for view in views) or view_tokens(spec, blank_grid) for views in taken)

    order: list[Tensor] = [torch.empty(0)] * len(counts)
    for other, views in enumerate(taken):
        start = other * most
        for view in views:
            order[view] = torch.arange(start, start + counts[view])
            start += counts[view]
    pieces = patches.split([h * w for h, w in grids])
    mine = taken[rank]
    return (
        torch.cat([pieces[view] for view in mine]) if mine else blank,
        [grids[view] for view in mine] if mine else [blank_grid],
        Share(most=most, order=torch.cat(order)),
    )


def gathered(rows: Tensor, share: Share, group: dist.ProcessGroup, *, alike: bool = True) -> Tensor:
    """[this rank's embeddings, D] -> [E, D], the whole row's in their order, on every rank of the group.

    alike: every rank sends back the whole gradient, as a tensor group does, so none needs another's. Otherwise each
    sends a part (the tokens of its context rank, say), and the parts are summed.
    """
    padded = F.pad(rows, (0, 0, 0, share.most - rows.shape[0]))
    return _Gather.apply(padded, group, alike).index_select(0, share.order)


class _Gather(torch.autograd.Function):
    """[most, D] of every rank -> [ranks * most, D]. Its gradient: see the top of the file."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, alike: bool) -> Tensor:
        ctx.group, ctx.alike = group, alike
        out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], rows.shape[1])
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks = dist.get_world_size(ctx.group)
        if ctx.alike:
            return gradient.chunk(ranks)[dist.get_rank(ctx.group)] * ranks, None, None
        own = gradient.new_empty(gradient.shape[0] // ranks, gradient.shape[1])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None, None
