"""A row cut over context ranks: who takes what, and attention that comes to the same as over the whole row."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_attention import HEADS, D, dense, layout, no_blocks, seen, tensors
from vlm_nemo.model.attention import context_attention
from vlm_nemo.model.batch import cut_slots
from vlm_nemo.model.context import Piece, cut_looks, cut_row, cut_segments
from vlm_nemo.model.looks import make_looks
from vlm_nemo.model.segments import make_segments


def test_one_sample_is_cut_zigzag() -> None:
    assert cut_row([0, 16], 2) == [
        [Piece(0, 12, 16), Piece(0, 0, 4)],  # tails first
        [Piece(0, 4, 12)],  # neighbours are one piece
    ]


def test_samples_of_a_chunk_each_are_nobody_s_tails() -> None:
    assert cut_row([0, 4, 8, 12, 16], 2) == [
        [Piece(0, 0, 4), Piece(12, 12, 16)],
        [Piece(4, 4, 8), Piece(8, 8, 12)],
    ]


def test_the_dearest_chunk_goes_with_the_cheapest() -> None:
    """Three quarters of a row are one sample: its end is dearer than all else, the last quarter as cheap as the
    first."""
    one, other = cut_row([0, 12, 16], 2)
    assert one == [Piece(0, 8, 12), Piece(0, 0, 4)]
    assert other == [Piece(0, 4, 8), Piece(12, 12, 16)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("lengths", [[48], [1] * 48, [30, 18], [7, 1, 16, 3, 21], [40, 2, 6]])
def test_every_token_has_one_place(ranks: int, lengths: list[int]) -> None:
    cu, segment = layout(lengths)
    cuts = cut_row(cu.tolist(), ranks)
    tokens = [t for pieces in cuts for p in pieces for t in range(p.start, p.stop)]
    assert sorted(tokens) == list(range(48))
    for pieces in cuts:
        assert sum(p.stop - p.start for p in pieces) == 48 // ranks
        for p in pieces:
            assert int(cu[segment[p.start]]) == p.first and segment[p.start] == segment[p.stop - 1]
    segments = make_segments(cu, 48)
    for rank in range(ranks):
        held, mine = cut_segments(segments, ranks, rank)
        reach = mine.reach
        assert reach is not None and reach.order.tolist() == tokens
        assert reach.order[reach.place].tolist() == list(range(48))
        assert held.tolist() == tokens[rank * 48 // ranks :][: 48 // ranks]
        assert int(mine.cu_seqlens_q[-1]) == 48 // ranks


def test_work_is_even() -> None:
    """Pairs of a query and a key, the rank with most over the mean, for rows of random samples."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(50):
        lengths = []
        while (left := 4096 - sum(lengths)) > 0:
            lengths.append(min(left, int(torch.randint(20, 2048, (1,), generator=generator))))
        cu, _ = layout(lengths)
        cuts = cut_row(cu.tolist(), 4)
        work = [sum((p.stop - p.first) ** 2 - (p.start - p.first) ** 2 for p in pieces) for pieces in cuts]
        worst = max(worst, max(work) * len(work) / sum(work))
    assert worst < 1.6  # zigzag by their place in the row: 2.2


ROWS = {
    "one sample": ([96], 96),
    "samples and padding": ([31, 9, 20, 16, 20], 76),
    "chunks of their own": ([24, 24, 24, 24], 96),
    "nothing but padding": ([96], 0),
    "a long one in the middle": ([5, 80, 11], 96),
}
BLOCKS = [(2, 7), (20, 29), (44, 60), (60, 62), (70, 96)]
"""Images: some lie over the chunks' borders, some over the samples'."""


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 500])
def test_attention_of_all_ranks_is_that_of_the_row(
    ranks: int, images: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, in fp64; the collective is left out, so that this is one process."""
    monkeypatch.setattr("vlm_nemo.model.sdpa.STRIPE", 5)
    for name, (lengths, used) in ROWS.items():
        cu, segment = layout(lengths)
        blocks = no_blocks(96)
        if images:
            for number, (start, end) in enumerate(BLOCKS):
                blocks[start:end] = number
        torch.manual_seed(0)
        q, k, v = (x.detach().double().requires_grad_() for x in tensors(96))
        weight = torch.randn(96, HEADS, D, dtype=torch.float64)
        weight[used:] = 0
        segments = make_segments(cu, used, blocks=blocks if images else None)
        pieces, tokens = [], []
        for rank in range(ranks):
            held, mine = cut_segments(segments, ranks, rank)
            assert mine.reach is not None
            spans = [(k[a:b], v[a:b]) for a, b in mine.reach.spans]
            pieces.append(context_attention(q[held], (k[held], v[held]), spans, mine, mine.reach, None, window))
            tokens.append(held)
        out = torch.empty_like(q).index_copy(0, torch.cat(tokens), torch.cat(pieces))
        expected = dense(q, k, v, seen(segment, blocks, window))
        assert (out - expected)[:used].abs().max() < 1e-12 if used else True, name
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
        for ours, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
            assert (ours - theirs).abs().max() < 1e-12, name


def test_masks_stay_small() -> None:
    """A sample of 6,000 tokens on two ranks: one mask for all stripes, not one for each."""
    segments = make_segments(torch.tensor([0, 6000], dtype=torch.int32), 6000)
    held, mine = cut_segments(segments, 2, 0)
    assert mine.reach is not None
    q, k, v = (torch.randn(6000, 1, 4) for _ in range(3))
    spans = [(k[a:b], v[a:b]) for a, b in mine.reach.spans]
    context_attention(q[held], (k[held], v[held]), spans, mine, mine.reach, None)
    assert sum(mask.numel() for mask in mine.masks.values()) < 6000 * 300


def test_placeholders_go_with_their_tokens() -> None:
    slots, there = cut_slots(torch.tensor([1, 2, 5]), torch.tensor([4, 5, 6, 7, 0, 1]), 8)
    assert slots.tolist() == [5, 1] and there.tolist() == [True, False, True]


def test_looks_go_with_their_tokens() -> None:
    """Samples of 6 and 4; two images of 2 and 3 features in the first, one of 4 in the second."""
    looks = make_looks([0, 6, 10], [1, 4, 6], [2, 3, 4])
    pieces = [Piece(0, 3, 6), Piece(6, 6, 7)]
    mine = cut_looks(looks, pieces, torch.tensor([3, 4, 5, 6]))
    assert mine.ranges == ((0, 1, ((0, 2),)), (1, 3, ((2, 5),)), (3, 4, ((5, 9),)))
    assert mine.seen.flatten().tolist() == [True] * 4
