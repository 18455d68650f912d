"""Where the samples of a packed row lie, in the form that attention needs. Pure: plain tensors, no model.

On CUDA in half precision the row goes to a variable-length kernel as it is. Everywhere else the samples are laid out
as a few rectangles, one sample a row, so that ordinary causal attention runs on each and no mask over T x T is made:

    cu = [0, 3, 7, 11]    lengths 3, 4, 4
    one rectangle of 3 x 4    [0 1 2 .] [3 4 5 6] [7 8 9 10]      '.' is a cell without a token

Samples of about the same length share a rectangle (`alike`). Behind a sample's own tokens the causal mask hides the
cells without one; without it (a vision tower's views and windows) only equal lengths share a rectangle.

Where the tokens of an image see one another (Gemma 3), each such block of tokens attends once more, to all of its
sample up to the block's end: no mask is needed for that either.

    sample of 6, tokens 2 to 4 an image      0 1 [2 3 4] 5      2, 3 and 4 see 0 to 4; 5 sees 0 to 5
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vlm_nemo.model.balance import Balance
from vlm_nemo.model.looks import Looks

SHORT = 256
"""Tokens of samples that are cheaper to compute with some empty cells than each by itself."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a context rank's tokens see beyond themselves (context.py): T tokens in the row, this rank has some of them.

    Its tokens stand in this order: the tails, which are pieces of samples that begin elsewhere, then whole samples and
    beginnings of samples, which see nothing but themselves.
    """

    tails: tuple[int, ...]
    """Tokens of each tail"""
    blocks: tuple[tuple[int, int, int], ...]
    """Of each piece of a block of image tokens: its first token here, the one behind its last, and how many of the keys
    that it sees stand before it"""
    spans: tuple[tuple[int, int], ...]
    """The row's tokens that each tail sees, then those that each piece of a block sees"""
    order: Tensor
    """[T] int64: the row's token at every place, all ranks' tokens side by side"""
    place: Tensor
    """[T] int64: the place of every token of the row"""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Reach:
        """The same, every tensor through `move`."""
        return replace(self, order=move(self.order), place=move(self.place))


@dataclass
class Segments(PackedSeqParams):
    """megatron's packed parameters, with the rectangles beside them. T tokens, all tensors on the model's device."""

    rectangles: list[tuple[int, int]] = field(default_factory=list)
    """rows and length of each; their cells follow one another in `cells`"""
    cells: Tensor | None = None
    """[C] int64: the token of every cell, 0 where there is none; None where the cells are the tokens in their order"""
    cell_of_token: Tensor | None = None
    """[T] int64: the cell of every token; None with `cells`"""
    causal: bool = True
    """Whether a token sees only those before it in its segment, or all of it."""
    windows: Segments | None = None
    """What layers with a window see instead (a vision tower's windows); None: the same"""
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    """Of every block: the first token of its sample, its own first token, and the one behind its last"""
    looks: Looks | None = None
    """Who attends to which image, in the layers that look at images"""
    reach: Reach | None = None
    """Of a context rank's part of a row, whose rectangles then hold what is behind the tails; None: the whole row"""
    balance: Balance | None = None
    """How much each token counts in the losses of experts' use; None: there are none"""
    masks: dict[tuple[int, int, int, int, bool], Tensor] = field(default_factory=dict)
    """Made by `stripe_mask` when first asked for, and shared by all layers"""

    def stripe_mask(
        self, queries: int, before: int, window: int, causal: bool, like: Tensor, *, behind: int = 0
    ) -> Tensor:
        """[queries, before + queries + behind] of like's dtype, to be added to scores: 0 where a query may look, else
        -inf.

        Queries stand behind `before` keys of their sample and before `behind`; each sees `window` tokens, itself
        included, and those behind it unless causal:

            queries 2, before 3, window 3, causal       . 0 0 0 .
                                                        . . 0 0 0
        """
        key = (queries, before, behind, window, causal)
        if key not in self.masks:
            back = torch.arange(before, before + queries, device=like.device)[:, None] - torch.arange(
                before + queries + behind, device=like.device
            )
            hidden = (back >= window) | (back < 0) if causal else back >= window
            self.masks[key] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, float("-inf")
            )
        return self.masks[key]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Segments:
        """The same, every tensor through `move`."""
        moved = copy.copy(self)
        moved.masks = {}
        moved.cu_seqlens_q = moved.cu_seqlens_kv = move(self.cu_seqlens_q)
        if self.reach is not None:
            moved.cu_seqlens_kv, moved.reach = move(self.cu_seqlens_kv), self.reach.moved(move)
        if self.cells is not None and self.cell_of_token is not None:
            moved.cells, moved.cell_of_token = move(self.cells), move(self.cell_of_token)
        moved.windows = self.windows.moved(move) if self.windows is not None else None
        moved.looks = self.looks.moved(move) if self.looks is not None else None
        moved.balance = self.balance.moved(move) if self.balance is not None else None
        return moved


def make_segments(
    cu_seqlens: Tensor, used_tokens: int, *, causal: bool = True, blocks: Tensor | None = None
) -> Segments:
    """Lay out a packed row.

    cu_seqlens: [S+1] int32 from 0 to T; used_tokens: where the padding starts. The padding is cut into pieces no
    longer than the longest sample, so that a nearly empty row costs no more attention than a full one.
    causal=False: attention inside each segment is full. blocks: [T], equal numbers >= 0 where neighbouring tokens see
    one another, -1 elsewhere.
    """
    cu = [int(c) for c in cu_seqlens.tolist()]
    total = cu[-1]
    bounds = [c for c in cu if c <= used_tokens]
    longest = max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=min(total, 128))
    while bounds[-1] < total:
        bounds.append(min(bounds[-1] + longest, total))

    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    rectangles, cells, cell_of_token = lay_out(lengths, causal)
    cu_out = torch.tensor(bounds, dtype=torch.int32)
    # "sbhd": megatron must keep the row as [T, 1, ...] and apply the rotary table row by row; its own "thd" path
    # reads cu_seqlens back to the host in every layer.
    return Segments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_out,
        cu_seqlens_kv=cu_out,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rectangles=rectangles,
        cells=cells,
        cell_of_token=cell_of_token,
        causal=causal,
        blocks=[] if blocks is None else block_runs(blocks, cu),
    )


def lay_out(lengths: Sequence[int], causal: bool) -> tuple[list[tuple[int, int]], Tensor | None, Tensor | None]:
    """Rectangles, cells and cells of tokens, as in Segments, of segments side by side."""
    size = torch.tensor(lengths, dtype=torch.int64)
    starts, total = size.cumsum(0) - size, int(size.sum())
    longest = alike(lengths) if causal else sorted(set(lengths))
    bucket = torch.searchsorted(torch.tensor(longest), size)
    rectangles, cells, cell_of_token, offset = [], [], torch.empty(total, dtype=torch.int64), 0
    for number, length in enumerate(longest):
        rows = (bucket == number).nonzero().flatten()
        column = torch.arange(length)
        tokens = starts[rows, None] + column
        inside = column < size[rows, None]
        rectangles.append((len(rows), length))
        cells.append(torch.where(inside, tokens, 0).flatten())
        cell_of_token[tokens[inside]] = offset + inside.flatten().nonzero().flatten()
        offset += tokens.numel()
    order = torch.cat(cells) if cells else cell_of_token
    if len(order) == total and bool((order == torch.arange(total)).all()):  # segments of one length
        return rectangles, None, None
    return rectangles, order, cell_of_token


def alike(lengths: Sequence[int]) -> list[int]:
    """The longest length of each group of lengths that share a rectangle, ascending.

    A length joins the group of a longer one if it misses no more than a tenth of it: on conversations the cells then
    hold 3 % more pairs of tokens than the samples do, with groups between powers of two 17 %. Up to SHORT a few empty
    cells cost less than one more call, and groups lie between powers of two.

        1023 1000 940 700 60 40 -> 60 700 1023
    """
    found: list[int] = []
    for length in sorted(set(lengths), reverse=True):
        if not found or not _joins(length, found[-1]):
            found.append(length)
    return found[::-1]


def _joins(length: int, longest: int) -> bool:
    if longest > SHORT:
        return length >= 0.9 * longest
    return (length - 1).bit_length() == (longest - 1).bit_length()  # neither exceeds a power of two that the other does


def block_runs(blocks: Tensor, cu: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of every block: the first token of its sample, its own first token, and the one behind its last.

    ([-1 0 0 1 1 -1], [0 4 6]) -> [(0, 1, 3), (0, 3, 4), (4, 4, 5)]: a number in two samples is two blocks.
    """
    changes = (blocks[1:] != blocks[:-1]).nonzero().flatten() + 1
    edges = sorted({0, *changes.tolist(), *cu})
    runs = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if blocks[a] >= 0]
    return [(cu[bisect.bisect_right(cu, a) - 1], a, b) for a, b in runs]
