"""Context parallelism: which tokens of a packed row each context rank takes, and the keys of the others' tokens.

A row is cut into twice as many chunks as there are ranks. Causal attention costs a token the more, the later in its
sample it stands; so the dearest chunk goes together with the cheapest, the next dearest with the next cheapest:

    one sample, two ranks      chunks  a a a a b b b b c c c c d d d d      rank 0 takes a and d, rank 1 b and c
    four samples, two ranks    chunks  all cost the same                    rank 0 takes a and d, rank 1 b and c

Every rank embeds its own tokens only, with the positions that they have in the row, and puts in what images give to
them. In attention keys and values of the whole row come together on every rank; of the queries each has its own.
`cut_row` and `cut_segments` are pure; `gather_keys` is the collective.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_nemo.model.looks import Look, Looks
from vlm_nemo.model.segments import Reach, Segments, lay_out
from vlm_nemo.runtime import groups


class Piece(NamedTuple):
    """Tokens [start, stop) of a row, all of one sample, which begins at `first`."""

    first: int
    start: int
    stop: int


def cut_row(bounds: Sequence[int], ranks: int) -> list[list[Piece]]:
    """The pieces that each rank takes, in the order in which it keeps them: tails of samples, then the others.

    bounds: where samples begin and the last ends, [0, ..., T]; T is a multiple of 2 x ranks. All get T / ranks tokens.
    """
    chunks, total = 2 * ranks, bounds[-1]
    assert total % chunks == 0, f"{total} tokens in {chunks} chunks"
    size = total // chunks
    costs = [sum(_cost(p) for p in _pieces(bounds, n * size, (n + 1) * size)) for n in range(chunks)]
    cheapest = sorted(range(chunks), key=lambda n: (costs[n], n))
    found = []
    for rank in range(ranks):
        one, other = sorted((cheapest[rank], cheapest[-1 - rank]))
        runs = [(one * size, (one + 1) * size), (other * size, (other + 1) * size)]
        if one + 1 == other:  # neighbours: what they hold of a sample is one piece
            runs = [(one * size, (other + 1) * size)]
        pieces = [piece for run in runs for piece in _pieces(bounds, *run)]
        found.append(sorted(pieces, key=lambda p: p.start == p.first))
    return found


def cut_segments(segments: Segments, ranks: int, rank: int) -> tuple[Tensor, Segments]:
    """[T / ranks] int64, the tokens of the row that `rank` takes, in its order; and the segments that they are.

    segments: of a whole causal row, on the CPU.
    """
    assert segments.causal and segments.windows is None and segments.reach is None
    cuts = cut_row(segments.cu_seqlens_q.tolist(), ranks)
    held = [torch.cat([torch.arange(p.start, p.stop) for p in pieces]) for pieces in cuts]
    order = torch.cat(held)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))

    mine = cuts[rank]
    tails = [p for p in mine if p.start > p.first]
    lengths = [p.stop - p.start for p in mine]
    seen = [p.stop - p.first for p in mine]
    blocks = cut_blocks(segments.blocks, mine)
    rectangles, cells, cell_of_token = lay_out(lengths[len(tails) :], True)
    return held[rank], Segments(
        qkv_format=segments.qkv_format,
        cu_seqlens_q=_bounds(lengths),
        cu_seqlens_kv=_bounds(seen),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(seen),
        rectangles=rectangles,
        cells=cells,
        cell_of_token=cell_of_token,
        looks=cut_looks(segments.looks, mine, held[rank]) if segments.looks is not None else None,
        reach=Reach(
            tails=tuple(lengths[: len(tails)]),
            blocks=tuple(block for block, _ in blocks),
            spans=(*((p.first, p.stop) for p in tails), *(span for _, span in blocks)),
            order=order,
            place=place,
        ),
    )


def cut_blocks(
    blocks: Sequence[tuple[int, int, int]], pieces: Sequence[Piece]
) -> list[tuple[tuple[int, int, int], tuple[int, int]]]:
    """Of every piece of a block, in the order of the tokens here: as in `Reach.blocks`, and the tokens that it sees."""
    found, at = [], 0
    for piece in pieces:
        for first, start, stop in blocks:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                here = at - piece.start
                found.append(((here + low, here + high, low - first), (first, stop)))
        at += piece.stop - piece.start
    return found


def cut_looks(looks: Looks, pieces: Sequence[Piece], tokens: Tensor) -> Looks:
    """Who of these tokens attends to which feature; every rank has all features."""
    ranges: list[Look] = []
    at = 0
    for piece in pieces:
        for start, stop, features in looks.ranges:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                here = at - piece.start
                ranges.append((here + low, here + high, features))
        at += piece.stop - piece.start
    return Looks(ranges=tuple(ranges), seen=looks.seen.index_select(0, tokens))


Keys = tuple[Tensor, Tensor]
"""Keys and values, both [n, kv_heads, d]"""


def gather_keys(k: Tensor, v: Tensor, reach: Reach) -> tuple[Keys, list[Keys]]:
    """This rank's keys and values as they are, and those of each of `reach.spans`, from all ranks of the context group.

    k, v: [T / ranks, kv_heads, d]. A collective, in the backward pass too: each rank's attention sends gradients to the
    keys of every token that it saw.
    """
    own_k, own_v, *rest = _Gather.apply(k, v, reach, groups.context_group())
    return (own_k, own_v), list(zip(rest[::2], rest[1::2], strict=True))


class _Gather(torch.autograd.Function):
    """All-gather and cut into spans; backward: add up what the spans got, reduce-scatter.

    One node for both, and a rank's own keys pass through it: so its backward runs on every rank, also on one whose
    tokens see nothing of the others. Spans may overlap; they are added one after the other, always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, reach: Reach, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        pair = torch.stack((k, v), dim=1)
        everywhere = pair.new_empty(len(reach.order), *pair.shape[1:])
        dist.all_gather_into_tensor(everywhere, pair, group=group)
        ctx.reach, ctx.group, ctx.shape, ctx.dtype = reach, group, pair.shape, pair.dtype
        ctx.set_materialize_grads(False)
        if not reach.spans:
            return k, v
        row = everywhere.index_select(0, reach.place)
        return k, v, *(row[a:b, i] for a, b in reach.spans for i in (0, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        reach: Reach = ctx.reach
        row = torch.zeros(len(reach.order), *ctx.shape[1:], dtype=ctx.dtype, device=reach.order.device)
        for number, (a, b) in enumerate(reach.spans):
            for i in (0, 1):
                if (grad := grads[2 + 2 * number + i]) is not None:
                    row[a:b, i] += grad
        mine = row.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(mine, row.index_select(0, reach.order), group=ctx.group)
        k, v = (mine[:, i] if own is None else mine[:, i] + own for i, own in enumerate(grads[:2]))
        return k, v, None, None


def _pieces(bounds: Sequence[int], start: int, stop: int) -> list[Piece]:
    """([0 5 9], 3, 8) -> [(0, 3, 5), (5, 5, 8)]"""
    found = []
    while start < stop:
        sample = bisect.bisect_right(bounds, start) - 1
        end = min(stop, bounds[sample + 1])
        found.append(Piece(bounds[sample], start, end))
        start = end
    return found


def _cost(piece: Piece) -> int:
    """Pairs of a query and a key that it sees."""
    low, high = piece.start - piece.first, piece.stop - piece.first
    return (high * (high + 1) - low * (low + 1)) // 2


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
