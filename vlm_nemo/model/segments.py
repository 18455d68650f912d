"""Where the samples of a packed row lie, in the form that attention needs. Pure: plain tensors, no model.

On CUDA in half precision the row goes to a variable-length kernel as it is. Everywhere else the samples are laid out
as a few rectangles, one sample a row, so that ordinary causal attention runs on each and no mask over T x T is made:

    cu = [0, 3, 7, 11]    lengths 3, 4, 4
    one rectangle of 3 x 4    [0 1 2 .] [3 4 5 6] [7 8 9 10]      '.' is a cell without a token

Lengths within a factor of two share a rectangle, so less than half of it is empty. Behind a sample's own tokens the
causal mask hides those cells; without it (a vision tower's views and windows) only equal lengths share a rectangle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


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

    def moved(self, move: Callable[[Tensor], Tensor]) -> Segments:
        """The same, every tensor through `move`."""
        moved = copy.copy(self)
        moved.cu_seqlens_q = moved.cu_seqlens_kv = move(self.cu_seqlens_q)
        if self.cells is not None and self.cell_of_token is not None:
            moved.cells, moved.cell_of_token = move(self.cells), move(self.cell_of_token)
        moved.windows = self.windows.moved(move) if self.windows is not None else None
        return moved


def make_segments(cu_seqlens: Tensor, used_tokens: int, *, causal: bool = True) -> Segments:
    """Lay out a packed row.

    cu_seqlens: [S+1] int32 from 0 to T; used_tokens: where the padding starts. The padding is cut into pieces no
    longer than the longest sample, so that a nearly empty row costs no more attention than a full one.
    causal=False: attention inside each segment is full.
    """
    cu = [int(c) for c in cu_seqlens.tolist()]
    total = cu[-1]
    bounds = [c for c in cu if c <= used_tokens]
    longest = max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=min(total, 128))
    while bounds[-1] < total:
        bounds.append(min(bounds[-1] + longest, total))

    lengths = torch.tensor(bounds[1:]) - torch.tensor(bounds[:-1])
    starts = torch.tensor(bounds[:-1])
    bucket = torch.ceil(torch.log2(lengths.float())).long() if causal else lengths
    rectangles, cells, cell_of_token, offset = [], [], torch.empty(total, dtype=torch.int64), 0
    for b in bucket.unique().tolist():
        rows = (bucket == b).nonzero().flatten()
        length = int(lengths[rows].max())
        column = torch.arange(length)
        tokens = starts[rows, None] + column
        inside = column < lengths[rows, None]
        rectangles.append((len(rows), length))
        cells.append(torch.where(inside, tokens, 0).flatten())
        cell_of_token[tokens[inside]] = offset + inside.flatten().nonzero().flatten()
        offset += tokens.numel()
    order = torch.cat(cells)
    in_order = len(order) == total and bool((order == torch.arange(total)).all())  # segments of one length
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
        cells=None if in_order else order,
        cell_of_token=None if in_order else cell_of_token,
        causal=causal,
    )
