"""Core attention for megatron-core's layers: full in the vision tower (whole images, views, windows), causal per
sample in packed rows.

Replaces megatron's DotProductAttention, which refuses packed rows, and its TransformerEngine twin, which needs CUDA.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.model.cache import CachedStep, attend_to_cache
from vlm_nemo.model.context import Keys, gather_keys
from vlm_nemo.model.kernels import flash_attention, flash_varlen
from vlm_nemo.model.sdpa import block_attention, repeat_kv, segment_attention, tail_attention
from vlm_nemo.model.segments import Reach, Segments
from vlm_nemo.runtime import device

AMPERE = 8
"""The first GPUs that torch's and FlashAttention's variable-length kernels run on, by CUDA's count."""


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
    if window is not None and window >= segments.max_seqlen_kv:
        window = None
    if segments.reach is not None:
        own, spans = gather_keys(k, v, segments.reach)
        return context_attention(q, own, spans, segments, segments.reach, scale, window)
    if _takes_varlen(q, segments):
        out = varlen_attention(q, k, v, segments, scale, window)
    else:
        out = segment_attention(q, k, v, segments, scale, window)
    if not segments.blocks:
        return out
    where = [(start, end, start - first) for first, start, end in segments.blocks]
    seen = [(k[first:end], v[first:end]) for first, _, end in segments.blocks]
    return block_attention(out, q, where, seen, segments, scale, window)


def _takes_varlen(q: Tensor, segments: Segments) -> bool:
    there = device.rehearsed(q) or (q.is_cuda and device.capability() >= AMPERE)
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[2] % 8 == 0 and q.shape[2] <= 256  # channels of a head: the kernels refuse others
    dense = not segments.causal and segments.cells is None and len(segments.rectangles) == 1
    return there and half and fits and not dense


def context_attention(
    q: Tensor,
    own: Keys,
    spans: Sequence[Keys],
    segments: Segments,
    reach: Reach,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """The same for a context rank's part of a row: own are the keys of its n tokens, spans what `reach` says that its
    tails, then its pieces of blocks see. [n, heads, d] -> [n, heads, d]."""
    tails, blocks = spans[: len(reach.tails)], spans[len(reach.tails) :]
    whole = len(q) - sum(reach.tails)
    if _takes_varlen(q, segments):
        keys, values = (torch.cat([*(tail[i] for tail in tails), own[i][len(q) - whole :]]) for i in (0, 1))
        out = varlen_attention(q, keys, values, segments, scale, window)
    else:
        *cut, rest = q.split([*reach.tails, whole])
        outputs = [tail_attention(q, *seen, segments, scale, window) for q, seen in zip(cut, tails, strict=True)]
        if whole:
            k, v = (x[len(q) - whole :] for x in own)
            outputs.append(segment_attention(rest, k, v, segments, scale, window))
        out = torch.cat(outputs)
    return block_attention(out, q, reach.blocks, blocks, segments, scale, window) if blocks else out


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
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, *repeat_kv(q, k, v)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """The same through a variable-length kernel (CUDA, half precision): FlashAttention's where it is installed, else
    torch's. q: [T, heads, d] -> the same; keys and values [K, kv_heads, d], of which each segment has as many as
    queries or, before those, more."""
    # Where there are more keys than queries, causal is counted from their ends
    ends = (segments.cu_seqlens_q, segments.cu_seqlens_kv, segments.max_seqlen_q, segments.max_seqlen_kv)
    flash = None if device.rehearsed(q) else flash_attention()
    if flash is not None:
        return flash_varlen(flash, q, k, v, ends, causal=segments.causal, scale=scale, window=window)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    if segments.causal:  # is spelled as a window
        options["window_size"] = (-1 if window is None else window - 1, 0)
    if k.shape[1] != q.shape[1]:
        if _varlen_takes_fewer():
            options["enable_gqa"] = True
        else:
            k, v = repeat_kv(q, k, v)
    return varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), *ends, **options)


@functools.cache
def _varlen_takes_fewer() -> bool:
    """Whether torch's kernel takes fewer heads of keys than of queries: 2.13 does, 2.11 does not say so."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
