"""FLOPs of a rehearsal against masks counted cell by cell and against the formulas that MFU goes by; bytes sent against
rings played through."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.check.test_gpu_memory import planned
from tests.on_cuda import STAGES, Case
from vlm_nemo.check.arithmetic import packed, pairs, rectangle
from vlm_nemo.check.meter import ring
from vlm_nemo.check.rows import blank_sample, full_row
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.model.flops import step_flops
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.stages import work_of
from vlm_nemo.train.optim import learns


def seen(queries: int, keys: int, left: int, right: int) -> int:
    """Cell by cell; the last query stands at the last key."""
    at = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    return int(((left < 0) | (key >= at - left)).logical_and((right < 0) | (key <= at + right)).sum())


def test_pairs_are_the_cells_that_a_mask_leaves() -> None:
    for queries, more, left, right in itertools.product((1, 4, 7), (0, 3), (-1, 0, 2, 9), (-1, 0, 1)):
        keys = queries + more
        assert pairs(queries, keys, left, right) == seen(queries, keys, left, right), (queries, keys, left, right)


def test_a_packed_row_is_the_sum_of_its_samples() -> None:
    row = torch.empty(12, 4, 8)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    whole = [torch.empty(1, 4, n, 8) for n in (5, 7)]
    assert packed(row, ends, None, True, None) == sum(rectangle(x, x, True) for x in whole)
    assert packed(row, ends, ends, False, (-1, -1)) == sum(rectangle(x, x, False) for x in whole)
    assert packed(row, ends, ends, True, (1, 0)) == 4 * 4 * 8 * (seen(5, 5, 1, 0) + seen(7, 7, 1, 0))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_sends_every_part_around(ranks: int) -> None:
    """Played through: each rank passes on what it has, until all have all."""
    has = [{rank} for rank in range(ranks)]
    sent = 0
    last = list(range(ranks))
    while any(len(parts) < ranks for parts in has):
        last = [last[rank - 1] for rank in range(ranks)]
        for parts, part in zip(has, last, strict=True):
            parts.add(part)
        sent += 1
    part = 600
    assert (
        ring("allgather_base", ranks * part, ranks) == sent * part == ring("reduce_scatter_base", ranks * part, ranks)
    )
    assert ring("allreduce", ranks * part, ranks) == 2 * sent * part
    assert ring("send", part, ranks) == part


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(), id="llava"),
        pytest.param(Case(language="mistral"), id="window"),
        pytest.param(Case(tower="qwen25_vit", reduction="merge", language="qwen2_vl"), id="qwen2.5-vl"),
        pytest.param(Case(experts=4), id="experts"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_row_without_padding_is_what_mfu_counts(case: Case, stage: int) -> None:
    """But for the diagonal of a causal mask, which is counted whole here and half there, and for the scores that a
    kernel makes again on its way back: two products of its five, where the formulas have four."""
    cfg = case.config()
    spec = spec_of(cfg)
    sample = blank_sample(spec, [plan_image(spec, (64, 96))], text=60)
    row = full_row(spec, sample, 3 * len(sample.tokens))
    assert row.used_tokens == len(row.tokens)
    found, trained = planned(replace(case, stage=stage), row), learns(STAGES[stage])
    work = work_of([row], cfg)
    given: dict[str, Any] = dict(lengths=work.lengths, grids=work.grids[0], supervised=work.supervised)
    given |= dict(views=work.views, looked=work.looked)
    whole, forward = step_flops(cfg, trained, **given), step_flops(cfg, dict.fromkeys(trained, False), **given)
    # The head's gradients are made with its loss
    assert sum(found.forward_flops) == pytest.approx(forward.total + whole.head - forward.head, rel=0.01)
    backward = whole.total - whole.head - forward.total + forward.head
    assert 1 <= sum(found.backward_flops) / backward < 1.15
