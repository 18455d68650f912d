"""Attention through rectangles against attention with a full block mask, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlm_nemo.model.attention import segment_attention
from vlm_nemo.model.segments import make_segments


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "used"), [([3], 3), ([1, 1, 5, 20, 2], 29), ([7, 9, 48], 16), ([16, 17, 1, 30], 64), ([64], 0)]
)
def test_equals_a_dense_mask(lengths: list[int], used: int, causal: bool) -> None:
    torch.manual_seed(0)
    total, heads, kv_heads, d = sum(lengths), 4, 2, 8
    q, k, v = (torch.randn(total, n, d, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = segment[:, None] == segment[None]
    if causal:
        mask &= torch.ones(total, total).tril().bool()
    weight = torch.randn(total, heads, d)
    weight[used:] = 0  # what padding attends to is nobody's business

    out = segment_attention(q, k, v, make_segments(cu, used, causal=causal), None)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    kk, vv = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    dense = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, kk, vv)), attn_mask=mask).transpose(0, 1)
    expected = torch.autograd.grad((dense * weight).sum(), (q, k, v))

    assert (out - dense)[:used].abs().max() < 1e-6 if used else True
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_padding_costs_no_more_than_samples() -> None:
    """One sample of 10 in a row of 1,000: the padding is cut into pieces of 10."""
    segments = make_segments(torch.tensor([0, 10, 1000], dtype=torch.int32), 10)
    assert segments.max_seqlen_q == 10
    assert segments.rectangles == [(100, 10)]
