"""Attention inside segments by torch's scaled_dot_product_attention, on any device, and never with a mask of T x T.

Samples go through it as rectangles (segments.py), layers with a window in stripes of queries. Of what sees more than a
causal mask gives, or stands behind keys that are no queries here, each has its own call: blocks, tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.context import Keys
from vlm_nemo.model.segments import Segments

STRIPE = 256
"""Queries of a tail at a time, where a mask hides what is behind each of them."""


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """Attention inside every segment, through the rectangles; blocks apart. [T, heads, d] -> [T, heads, d]."""
    groups = q.shape[1] // k.shape[1]
    spread = [x.flatten(1) for x in (q, k, v)]
    if segments.cells is not None:
        spread = [_Spread.apply(x, segments.cells, segments.cell_of_token) for x in spread]
    outputs, start = [], 0
    for rows, length in segments.rectangles:
        cut = slice(start, start + rows * length)
        start = cut.stop
        qr, kr, vr = (x[cut].view(rows, length, -1, q.shape[2]).transpose(1, 2) for x in spread)
        if groups > 1:
            kr, vr = kr.repeat_interleave(groups, dim=1), vr.repeat_interleave(groups, dim=1)
        if window is not None and window < length:
            out = _striped(qr, kr, vr, segments, scale, window)
        else:
            out = F.scaled_dot_product_attention(qr, kr, vr, is_causal=segments.causal, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(rows * length, -1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if segments.cells is not None:
        joined = _Gather.apply(joined, segments.cells, segments.cell_of_token)
    return joined.view_as(q)


def _striped(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int) -> Tensor:
    """Causal attention of `window` tokens: a stripe of queries at a time, with the stripes of keys that it reaches.

    [rows, heads, length, d] -> the same. Work and masks grow with length x window, not length x length; stripes are
    split and joined, not sliced, because a slice's gradient is as large as the whole.
    """
    stripe = min(max(window, 128), 1024)
    reach = -(-(window - 1) // stripe)
    queries, keys, values = (x.split(stripe, dim=2) for x in (q, k, v))
    outputs = []
    for i, query in enumerate(queries):
        first = max(0, i - reach)
        key, value = (torch.cat(x[first : i + 1], dim=2) for x in (keys, values))
        mask = segments.stripe_mask(query.shape[2], (i - first) * stripe, window, True, q)
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2)


def tail_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """Causal attention of the last n of N tokens of a sample to all of them: q [n, heads, d], k and v [N, kv_heads, d]
    -> [n, heads, d].

    A stripe of queries at a time. Without a window all stripes, of all tails, look through one mask of STRIPE rows,
    pushed along; with one, a stripe takes the keys that it reaches.
    """
    outputs, stripe = [], STRIPE if window is None else min(max(window, 128), 1024)
    longest = segments.max_seqlen_kv
    first = len(k) - len(q)
    for query in q.split(stripe):
        n = len(query)
        low = 0 if window is None else max(0, first - window + 1)
        if window is None:
            mask = segments.stripe_mask(stripe, longest, longest + stripe, True, q)[:n, longest - first : longest + n]
            mask = mask.contiguous() if q.is_cuda else mask  # CUDA's kernels want their rows aligned
        else:
            mask = segments.stripe_mask(n, first - low, window, True, q)
        outputs.append(_attend(query, k[low : first + n], v[low : first + n], mask, scale))
        first += n
    return torch.cat(outputs)


def block_attention(
    out: Tensor,
    q: Tensor,
    blocks: Sequence[tuple[int, int, int]],
    seen: Sequence[Keys],
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """out, with the answers to the tokens of blocks anew: they see all of their sample up to their block's end, from
    `window` tokens before themselves on. q, out: [T, heads, d].

    blocks: of each its first token, the one behind its last, and how many of the keys in `seen` stand before it.
    """
    sizes, at = [], 0
    for start, end, _ in blocks:
        sizes += [start - at, end - start]
        at = end
    sizes.append(len(q) - at)
    pieces, queries = list(out.split(sizes)), q.split(sizes)
    for i, ((start, end, before), (k, v)) in enumerate(zip(blocks, seen, strict=True)):
        mask, n = None, end - start
        if window is not None:
            low = max(0, before - window + 1)
            k, v, before = k[low:], v[low:], before - low
            if before + n > window:
                mask = segments.stripe_mask(n, before, window, False, q, behind=len(k) - before - n)
        pieces[2 * i + 1] = _attend(queries[2 * i + 1], k, v, mask, scale)
    return torch.cat(pieces)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q [n, heads, d], k and v [N, kv_heads, d], mask [n, N] -> [n, heads, d]"""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, *repeat_kv(q, k, v)))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[0].transpose(0, 1)


class _Spread(torch.autograd.Function):
    """Tokens -> cells. A cell without a token repeats token 0: it lies behind its sample, where no token looks.

    Every token has exactly one cell of its own, so the gradient is a plain gather, not a scatter-add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor, cell_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of_token)
        return x.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cell_of_token,) = ctx.saved_tensors
        return grad.index_select(0, cell_of_token), None, None


class _Gather(torch.autograd.Function):
    """Cells -> tokens, the inverse of _Spread; a cell without a token gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor, cell_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(cells, cell_of_token)
        return x.index_select(0, cell_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cells, cell_of_token = ctx.saved_tensors
        out = grad.new_zeros(cells.shape[0], grad.shape[1])
        return out.index_copy_(0, cell_of_token, grad), None, None


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: each key/value head serves heads / kv_heads query heads (axis -2)."""
    groups = q.shape[-2] // k.shape[-2]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=-2), v.repeat_interleave(groups, dim=-2)
