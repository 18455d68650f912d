"""Core attention for megatron-core's layers: full in the vision tower (whole images, views, windows), causal per
sample in packed rows.

Replaces megatron's DotProductAttention, which refuses packed rows, and its TransformerEngine twin, which needs CUDA.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.model.cache import CachedStep, attend_to_cache
from vlm_nemo.model.kernels import flash_attention, flash_varlen
from vlm_nemo.model.segments import Segments


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, for this tensor rank's heads.

    q: [T, B, heads, d], k and v: [T, B, kv_heads, d] -> [T, B, heads * d].
    With `packed_seq_params` (B must be 1) a token sees its own segment only, and of that what came before where the
    segments are causal; what came before in a CachedStep (generation) is in the cache.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.layer = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale
        self.local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # megatron counts the tokens before a query, without itself
        self.window = config.window_size[0] + 1 if self.local and self.causal else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | CachedStep | None = None,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None, "masks come from the segments"
        if packed_seq_params is None:
            assert self.window is None, "windows go by segments"
            return dense_attention(query, key, value, self.causal, self.scale)
        assert query.shape[1] == 1, "one packed row at a time"
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if isinstance(packed_seq_params, CachedStep):
            out = cached_attention(q, k, v, packed_seq_params, self.layer, self.scale, self.window)
        else:
            segments = packed_seq_params
            if self.local and segments.windows is not None:
                segments = segments.windows
            assert self.causal == segments.causal, "the layer's mask and the row's layout"
            out = packed_attention(q, k, v, segments, self.scale, self.window)
        return out.flatten(1).unsqueeze(1)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """Attention inside every segment, causal if the segments are. [T, heads, d] -> [T, heads, d].

    window: how many tokens a query sees, itself included; those of its block behind it come on top. None: all.
    """
    if window is not None and window >= segments.max_seqlen_q:
        window = None
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    dense = not segments.causal and segments.cells is None and len(segments.rectangles) == 1
    if half and not dense and (window is None or flash_attention() is not None or _varlen_has("window_size")):
        out = varlen_attention(q, k, v, segments, scale, window)
    else:
        out = segment_attention(q, k, v, segments, scale, window)
    return block_attention(out, q, k, v, segments, scale, window) if segments.blocks else out


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, step: CachedStep, layer: int, scale: float | None, window: int | None
) -> Tensor:
    """Remember this step's keys and values, then attend: prompts inside themselves, the others to their slot."""
    keys, values = step.cache.write(layer, step.slots, step.positions, k, v)
    outputs = []
    if step.prompts is not None:
        q1, k1, v1 = (x[: step.prompt_tokens] for x in (q, k, v))
        outputs.append(packed_attention(q1, k1, v1, step.prompts, scale, window))
    if step.queries is not None:
        outputs.append(attend_to_cache(q, step, keys, values, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Unpacked attention: [T, B, heads, d] -> [T, B, heads * d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, *_repeat_kv(q, k, v)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


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


def block_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """out, with the answers to the tokens of blocks anew: they see all of their sample up to their block's end, from
    `window` tokens before themselves on. All [T, heads, d]."""
    sizes, at = [], 0
    for _, start, end in segments.blocks:
        sizes += [start - at, end - start]
        at = end
    sizes.append(len(q) - at)
    pieces, queries = list(out.split(sizes)), q.split(sizes)
    for i, (first, start, end) in enumerate(segments.blocks):
        mask = None
        if window is not None:
            first = max(first, start - window + 1)
            if end - first > window:
                mask = segments.stripe_mask(end - start, start - first, window, False, q)
        seen = (queries[2 * i + 1], *_repeat_kv(q, k[first:end], v[first:end]))
        query, key, value = (x.transpose(0, 1)[None] for x in seen)
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        pieces[2 * i + 1] = answer[0].transpose(0, 1)
    return torch.cat(pieces)


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


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """The same through a variable-length kernel (CUDA, half precision): FlashAttention's where it is installed, else
    torch's. [T, heads, d] -> [T, heads, d]."""
    cu, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    if (flash := flash_attention()) is not None:
        return flash_varlen(flash, q, k, v, cu, longest, causal=segments.causal, scale=scale, window=window)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    # torch 2.13 spells causal as a window; 2.10 and 2.11 as a flag.
    if segments.causal and _varlen_has("window_size"):
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif segments.causal:
        options["is_causal"] = True
    if scale is not None:
        options["scale"] = scale
    if k.shape[1] != q.shape[1]:
        if _varlen_has("enable_gqa"):
            options["enable_gqa"] = True
        else:
            k, v = _repeat_kv(q, k, v)
    return varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, longest, longest, **options)


@functools.cache
def _varlen_has(option: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return option in inspect.signature(varlen_attn).parameters


def _repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: each key/value head serves heads / kv_heads query heads (axis -2)."""
    groups = q.shape[-2] // k.shape[-2]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=-2), v.repeat_interleave(groups, dim=-2)
