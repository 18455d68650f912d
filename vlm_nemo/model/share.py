"""One row's images shared out over ranks that each hold the whole tower: who takes which views, and all embeddings
together again.

Where the tower is split over tensor ranks nothing is shared out, nor where its features are kept (`embedders`).

Three ranks, four views that give 4, 4, 2 and 2 embeddings:

    rank 0   view 0            0 0 0 0
    rank 1   view 1            1 1 1 1
    rank 2   views 2 and 3     2 2 3 3
    gathered, on every rank    0 0 0 0 | 1 1 1 1 | 2 2 3 3

Every rank hands in as many rows as the one with most has, and one without a view runs a blank one, so that all run the
same collectives whatever a row holds.

A parameter of the tower is on every rank and sees other images on each, so its gradient is the sum over them. The
ranks are tensor x context. What comes back from the decoder is the same on all tensor ranks, and of context ranks each
has the part of its own tokens: the gather's gradient sums them all, so it is `tensor` times the true one. When a step's
gradients are finished, megatron averages those that `boxes.mark_shared` marks over the tensor group, and sums over
context and data ranks. What each rank computes alike (an extra row of the projector) comes out right too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import view_flops
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.views import Grid, VisionBatch, blank_batch, vision_batch
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import vision_layout

Place = tuple[int, int]
"""A rank of a group, and how many it has."""


@dataclass(frozen=True, kw_only=True)
class Embedders:
    """Who embeds a row's images, of the ranks that see the row (tensor x context)."""

    towers: int
    """Whole towers among them: one a rank, or each split over the tensor ranks."""
    shared: bool
    """Each tower takes some of the images; else each embeds all of them."""

    @property
    def ranks(self) -> int:
        """That share out the images; 1 where nothing is shared out."""
        return self.towers if self.shared else 1

    @property
    def place(self) -> Place:
        """This rank's among them."""
        return (dist.get_rank(groups.image_group()), self.ranks) if self.shared else (0, 1)

    def times(self, cfg: ModelConfig, rows: Sequence[Sequence[Grid]], views: Sequence[int] | None = None) -> float:
        """How often the arithmetic of all images is done, in the time of all ranks together, over rows of such views:
        they wait for the busiest one."""
        return uneven(cfg, rows, self.towers, views) if self.shared else float(self.towers)


def embedders(parallel: ParallelConfig, *, kept: bool) -> Embedders:
    """kept: what the tower makes of images is kept (data.vision_cache). It is kept and read whole, so each rank with a
    tower embeds all images: once an image, and what is read back costs the projector alone."""
    tensor = vision_layout(parallel).tensor
    towers = parallel.tensor * parallel.context // tensor
    return Embedders(towers=towers, shared=tensor == 1 and towers > 1 and not kept)


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


def costs_of(cfg: ModelConfig, grids: Sequence[Grid], tiles: Sequence[int]) -> list[float]:
    """FLOPs of each of what is shared out: grids and numbers of tiles, 1 where views go one by one."""
    known = {piece: view_flops(cfg, *piece) for piece in set(zip(grids, tiles, strict=True))}
    return [known[piece] for piece in zip(grids, tiles, strict=True)]


def uneven(cfg: ModelConfig, rows: Iterable[Sequence[Grid]], ranks: int, views: Sequence[int] | None = None) -> float:
    """How much longer the busiest rank takes than if all had equal shares, over rows of such views; at least 1.

    views: of every image, one row after the other; needed where tiles go together.
    """
    busiest = total = 0.0
    left = iter(views or ())
    for grids in rows:
        tiles = [1] * len(grids)
        if cfg.vision.tiles is not None:
            tiles = []
            while sum(tiles) < len(grids):
                tiles.append(next(left))
        costs = costs_of(cfg, [grids[end - count] for end, count in zip(accumulate(tiles), tiles, strict=True)], tiles)
        busiest += max(sum(costs[i] for i in taken) for taken in dealt(costs, ranks))
        total += sum(costs)
    return busiest * ranks / total if total else 1.0


def share_views(
    patches: Tensor, grids: Tensor, cfg: ModelConfig, place: Place, tilings: Tensor | None = None
) -> tuple[VisionBatch, Share]:
    """This rank's views of a row, or a blank one; and where everyone's embeddings go. Every rank plans the same.

    patches: [P, p*p*3] and grids: [V, 2] of all views; on the CPU. tilings: as `vision_batch` takes them; the tiles of
    an image, which look at one another, stay together.
    """
    rank, ranks = place
    spec, tiles = spec_of(cfg), cfg.vision.tiles
    known = [(int(h), int(w)) for h, w in grids.tolist()]
    assert (tiles is None) or tilings is not None, "a tower with tiles wants to know their arrangement"
    sizes = [1] * len(known) if tiles is None or tilings is None else tilings.prod(1).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def given(grid: Grid) -> int:
        """Embeddings of a view, or of an image, whose unused tiles count."""
        return view_tokens(spec, grid) * (tiles or 1)

    counts = [given(known[start]) for start in starts]
    taken = dealt(costs_of(cfg, [known[start] for start in starts], sizes), ranks)
    most = max(sum(counts[i] for i in mine) or given((spec.factor, spec.factor)) for mine in taken)
    order = [torch.empty(0)] * len(counts)
    for other, mine in enumerate(taken):
        at = other * most
        for i in mine:
            order[i] = torch.arange(at, at + counts[i])
            at += counts[i]
    share = Share(most=most, order=torch.cat(order))

    mine = taken[rank]
    if not mine:
        return blank_batch(cfg.vision, spec.factor), share
    views = [view for i in mine for view in range(starts[i], starts[i] + sizes[i])]
    pieces = patches.split([h * w for h, w in known])
    own = vision_batch(
        torch.cat([pieces[view] for view in views]),
        [known[view] for view in views],
        cfg.vision,
        None if tiles is None or tilings is None else tilings[mine],
    )
    return own, share


def gathered(rows: Tensor, share: Share, *, alike: bool) -> Tensor:
    """[this rank's embeddings, D] -> [E, D], the whole row's in their order, on every rank of `groups.image_group()`.

    alike: every rank sends back the same gradient, as without context parallelism, so none needs another's.
    """
    padded = F.pad(rows, (0, 0, 0, share.most - rows.shape[0]))
    return _Gather.apply(padded, groups.image_group(), alike).index_select(0, share.order)


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
