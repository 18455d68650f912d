"""FLOPs of one operation: torch's own formulas for matrix products, ours for attention as its kernels compute it.

torch counts no attention of a CPU, and of a packed row on shapes every sample as long as the longest. A kernel computes
what a causal mask or a window leaves, not the square; its backward pass makes the scores once more, so it has five
products where the forward pass has two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import varlen
from torch.utils.flop_counter import flop_registry

aten, own = torch.ops.aten, torch.ops.torch_attn
assert varlen.varlen_attn, "its import makes the operations"


def pairs(queries: int, keys: int, left: int = -1, right: int = -1) -> int:
    """Of query and key in a sample whose last query stands at its last key: a query sees so many keys to its left and
    right besides its own, -1 = all.

    (3, 3, right=0) -> 1 + 2 + 3
    """
    before = keys - queries
    if left < 0 and right < 0:
        return queries * keys
    if left < 0 and right == 0:
        return queries * before + queries * (queries + 1) // 2
    first = [0 if left < 0 else max(0, before + i - left) for i in range(queries)]
    last = [keys if right < 0 else min(keys, before + i + right + 1) for i in range(queries)]
    return sum(last) - sum(first)


def rectangle(query: Tensor, key: Tensor, causal: bool) -> int:
    """Forward, of q [B, heads, n, d] and k [B, heads, N, d]."""
    batch, heads, n, width = query.shape
    return 4 * batch * heads * width * pairs(n, key.shape[2], right=0 if causal else -1)


def packed(query: Tensor, ends: Tensor, key_ends: Tensor | None, causal: bool, window: Any) -> int:
    """Forward, of q [T, heads, d] in samples that end there."""
    with unset_fake_temporarily():  # the ends have numbers even where all else is shapes
        samples = [x.tolist() for x in (ends, ends if key_ends is None else key_ends)]
    queries, keys = ([b - a for a, b in zip(x, x[1:], strict=False)] for x in samples)
    left, right = window or (-1, -1)
    if causal:
        right = 0
    each = sum(pairs(n, m, left, right) for n, m in zip(queries, keys, strict=True))
    return 4 * query.shape[1] * query.shape[2] * each


def _named(operation: Any, count: Callable[[dict[str, Any]], int]) -> Callable[..., int]:
    """A formula that finds its operation's arguments by their names, which stand elsewhere in other torch's."""
    names = [argument.name for argument in operation.default._schema.arguments]

    def formula(*given: Any, out_val: Any = None, **named: Any) -> int:
        return count(dict(zip(names, given, strict=False)) | named)

    return formula


def _of_rectangle(a: dict[str, Any]) -> int:
    return rectangle(a["query"], a["key"], a.get("is_causal", False))


def _of_packed(a: dict[str, Any]) -> int:
    return packed(a["query"], a["cu_seq_q"], a["cu_seq_k"], a.get("is_causal", False), a.get("window_size"))


def _back(count: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], int]:
    return lambda a: count(a) * 5 // 2


_forward = aten._scaled_dot_product_flash_attention_for_cpu
_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _forward: _named(_forward, _of_rectangle),
    _backward: _named(_backward, _back(_of_rectangle)),
    own._varlen_attn: _named(own._varlen_attn, _of_packed),
    own._varlen_attn_backward: _named(own._varlen_attn_backward, _back(_of_packed)),
}
"""By operation: its arguments, and what it gave as out_val -> FLOPs."""
