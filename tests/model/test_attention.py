"""Attention in rectangles, stripes, blocks and through the cache, against one full mask, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.attention import cached_attention, packed_attention
from vlm_nemo.model.cache import KVCache, cached_step
from vlm_nemo.model.segments import SHORT, alike, make_segments

HEADS, KV_HEADS, D = 4, 2, 8


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The witness: every query against every key under one mask. [T, heads, d] -> [T, heads, d]."""
    kk, vv = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, kk, vv)), attn_mask=mask).transpose(0, 1)


def seen(segment: Tensor, blocks: Tensor, window: int | None) -> Tensor:
    """[T, T] as Gemma 3 says it: AND(window, OR(causal, same block)) inside a segment."""
    q, k = torch.arange(len(segment))[:, None], torch.arange(len(segment))
    mask = (k <= q) | ((blocks[:, None] == blocks) & (blocks >= 0))
    if window is not None:
        mask &= k > q - window
    return mask & (segment[:, None] == segment)


def tensors(total: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(total, n, D, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def layout(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and every token's segment."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return cu, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def no_blocks(total: int) -> Tensor:
    return torch.full((total,), -1)


def agree(segments: object, mask: Tensor, used: int, window: int | None, within: float = 1e-6) -> None:
    torch.manual_seed(0)
    q, k, v = tensors(len(mask))
    weight = torch.randn(len(mask), HEADS, D)
    weight[used:] = 0  # what padding attends to is nobody's business
    out = packed_attention(q, k, v, segments, None, window)  # type: ignore[arg-type]
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_out = dense(q, k, v, mask)
    expected = torch.autograd.grad((expected_out * weight).sum(), (q, k, v))
    assert (out - expected_out)[:used].abs().max() < within if used else True
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("lengths", "used"), [([3], 3), ([1, 1, 5, 20, 2], 29), ([7, 9, 48], 16), ([16, 17, 1, 30], 64), ([64], 0)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_dense_mask(lengths: list[int], used: int, causal: bool) -> None:
    cu, segment = layout(lengths)
    mask = seen(segment, no_blocks(len(segment)), None) if causal else segment[:, None] == segment
    agree(make_segments(cu, used, causal=causal), mask, used, None)


@pytest.mark.parametrize("window", [1, 5, 129, 150, 2000])
def test_windows(window: int) -> None:
    """Longer than the stripes of queries, in several rectangles, with padding; sums of 400 terms."""
    cu, segment = layout([300, 12, 400, 140, 60])
    agree(make_segments(cu, 852), seen(segment, no_blocks(len(segment)), window), 852, window, within=2e-6)


@pytest.mark.parametrize("window", [None, 1, 6, 20, 200])
def test_blocks(window: int | None) -> None:
    """Images at the start and the end of a sample, side by side, longer than the window, and none."""
    cu, segment = layout([40, 9, 160, 31, 20])
    blocks = no_blocks(len(segment))
    for number, (start, end) in enumerate([(0, 5), (30, 40), (40, 41), (60, 76), (76, 92), (150, 200), (215, 230)]):
        blocks[start:end] = number
    agree(make_segments(cu, 240, blocks=blocks), seen(segment, blocks, window), 240, window)


def test_an_image_beside_the_next_sample_s_stays_in_its_own() -> None:
    cu, segment = layout([4, 4])
    blocks = torch.tensor([-1, -1, 0, 0, 0, -1, -1, -1])
    agree(make_segments(cu, 8, blocks=blocks), seen(segment, blocks, None), 8, None)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_cached_steps_equal_one_pass(window: int | None) -> None:
    """Two sequences by steps of unequal lengths, images in prompts and in what goes on, against each in one piece."""
    torch.manual_seed(0)
    lengths = [30, 23]
    blocks = [no_blocks(n) for n in lengths]
    blocks[0][2:8], blocks[0][17:22], blocks[1][9:20] = 0, 1, 1
    whole = [tensors(n) for n in lengths]
    # Where each sequence has come to behind every step; a prompt enters beside a step that goes on
    steps = [(11, 0), (12, 9), (22, 21), (23, 22), (30, 23)]
    cache, held = KVCache(3, 64), [0, 0]
    found: list[list[Tensor]] = [[], []]
    for ends in steps:
        rows = [(2 * i, held[i], ends[i] - held[i]) for i in range(2) if ends[i] > held[i]]
        rows.sort(key=lambda row: row[1] > 0)
        part = [slice(start, start + n) for _, start, n in rows]
        which = [slot // 2 for slot, _, _ in rows]
        ids = torch.cat([blocks[i][p] for i, p in zip(which, part, strict=True)])
        step = cached_step(cache, rows, torch.device("cpu"), ids)
        q, k, v = (torch.cat([whole[i][n][p] for i, p in zip(which, part, strict=True)]).detach() for n in range(3))
        out = cached_attention(q, k, v, step, 1, None, window).split([n for _, _, n in rows])
        for i, piece in zip(which, out, strict=True):
            found[i].append(piece)
        held = list(ends)
    for i, n in enumerate(lengths):
        expected = dense(*whole[i], seen(torch.zeros(n), blocks[i], window))
        assert (torch.cat(found[i]) - expected).abs().max() < 1e-6


def test_padding_costs_no_more_than_samples() -> None:
    """One sample of 10 in a row of 1,000: the padding is cut into pieces of 10."""
    segments = make_segments(torch.tensor([0, 10, 1000], dtype=torch.int32), 10)
    assert segments.max_seqlen_q == 10
    assert segments.rectangles == [(100, 10)]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_only_like_lengths_share_a_rectangle(lengths: list[int]) -> None:
    longest = alike(lengths)
    assert longest == sorted(set(longest)) and set(longest) <= set(lengths) and longest[-1] == max(lengths)
    for length in lengths:
        limit = next(limit for limit in longest if limit >= length)
        assert length > limit / 2 if limit <= SHORT else length >= 0.9 * limit
    for short, long in itertools.pairwise(longest):
        assert long <= SHORT or short < 0.9 * long, "no more rectangles than needed"
    assert sum(limit <= SHORT for limit in longest) <= 9, "one for each power of two"


def test_masks_stay_small() -> None:
    """A row of 6,000 tokens in a window of 64, images in it: what the masks hold does not grow with the row."""
    blocks = no_blocks(6000)
    blocks[1000:1100], blocks[3000:3100] = 0, 1
    segments = make_segments(torch.tensor([0, 6000], dtype=torch.int32), 6000, blocks=blocks)
    q, k, v = (torch.randn(6000, 1, 4) for _ in range(3))
    packed_attention(q, k, v, segments, None, 64)
    assert sum(mask.numel() for mask in segments.masks.values()) < 6000 * 64
