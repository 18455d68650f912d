"""Cuts of a decoder into stages, against every cut that there is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from tests import tiny
from vlm_nemo.check.advice import better_cut
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import step_flops
from vlm_nemo.model.stages import (
    Costs,
    Work,
    balanced,
    busiest,
    chunk_layers,
    costs_of,
    layout,
    once_kept,
    resolved,
    stage_costs,
    work_of,
)
from vlm_nemo.runtime.config import ParallelConfig

STAGE1 = {"vision": False, "projector": True, "language": False}
STAGE2 = {"vision": False, "projector": True, "language": True}
ALL = {"vision": True, "projector": True, "language": True}


def cuts(layers: int, chunks: int, fewest: int) -> list[list[int]]:
    """fewest: layers of the first chunk; the others have one at least."""
    ends = itertools.combinations(range(fewest, layers), chunks - 1)
    return [[b - a for a, b in itertools.pairwise((0, *inner, layers))] for inner in ends]


def drawn(seed: int, layers: int, equal: bool) -> Costs:
    rng = random.Random(seed)
    each = [float(rng.choice((3, 4, 9)) if not equal else 4) for _ in range(layers)]
    return Costs(first=float(rng.randrange(0, 30)), layers=tuple(each), last=float(rng.randrange(0, 12)))


@pytest.mark.parametrize("seed", range(12))
def test_no_cut_has_a_cheaper_dearest_stage_or_is_more_even(seed: int) -> None:
    layers, stages = 6 + seed % 5, 2 + seed % 4
    costs = drawn(seed, layers, equal=False)
    found = balanced(costs, ParallelConfig(pipeline=stages))

    def judged(cut: list[int]) -> tuple[float, float, list[int]]:
        each = stage_costs(costs, cut, stages)
        return max(each), sum(x * x for x in each), cut

    assert judged(found) == min(judged(cut) for cut in cuts(layers, stages, 0))


@pytest.mark.parametrize("seed", range(8))
def test_no_interleaved_cut_has_a_cheaper_dearest_stage(seed: int) -> None:
    costs = drawn(seed, 7 + seed % 4, equal=True)
    found = balanced(costs, ParallelConfig(pipeline=2, virtual=2))
    assert sum(found) == len(costs.layers) and min(found) >= 1
    best = min(max(stage_costs(costs, cut, 2)) for cut in cuts(len(costs.layers), 4, 1))
    assert max(stage_costs(costs, found, 2)) == best


def test_the_picture_of_the_docstring() -> None:
    costs = Costs(first=6.0, layers=(2.0,) * 8, last=4.0)
    found = balanced(costs, ParallelConfig(pipeline=3))
    assert found == [1, 4, 3]
    assert stage_costs(costs, found, 3) == [8, 8, 10]


def test_without_costs_layers_are_spread_evenly() -> None:
    for layers, pipeline, virtual in ((34, 4, 1), (34, 4, 2), (5, 2, 2), (8, 4, 1), (7, 3, 1)):
        found = chunk_layers(layers, ParallelConfig(pipeline=pipeline, virtual=virtual))
        assert sum(found) == layers and len(found) == pipeline * virtual and max(found) - min(found) <= 1
    assert chunk_layers(5, ParallelConfig(pipeline=2, layers=[4, 1])) == [4, 1]


def test_gemma_3_of_34_layers_on_four_stages() -> None:
    """A 4B decoder of 34 layers with a head over 262208 words: the last stage gets fewer layers, the first one too."""
    cfg = ModelConfig()
    cfg.language.num_layers, cfg.language.hidden_size, cfg.language.ffn_hidden_size = 34, 2560, 10240
    cfg.language.num_heads, cfg.language.num_kv_heads, cfg.language.head_dim = 8, 4, 256
    cfg.language.vocab_size = 262208
    work = Work(lengths=(2048,) * 8, grids=(((64, 64),) * 8,), supervised=8 * 1500)
    parallel = ParallelConfig(pipeline=4)
    costs = costs_of(cfg, parallel, STAGE2, work)
    found = balanced(costs, parallel)
    assert sum(found) == 34
    assert found[0] < found[1] and found[3] < found[2]
    even = busiest(stage_costs(costs, [8, 9, 9, 8], 4))
    assert busiest(stage_costs(costs, found, 4)) < 1.1 < even


def test_costs_are_what_a_step_needs() -> None:
    cfg, row = tiny.tiny_model(window=8, global_every=2), tiny.rows(4)
    work = work_of(row, cfg)
    assert work.lengths[:3] == (12, 19, 8) and len(work.grids) == 4 and work.grids[1] == ()
    for trained in (STAGE1, STAGE2, ALL):
        costs = costs_of(cfg, ParallelConfig(pipeline=2), trained, work)
        grids = [grid for views in work.grids for grid in views]
        whole = step_flops(cfg, trained, lengths=work.lengths, grids=grids, supervised=work.supervised)
        assert costs.first + sum(costs.layers) + costs.last == pytest.approx(whole.total)
        assert costs.layers[0] < costs.layers[1], "a local layer sees less"


def test_frozen_parts_move_the_cut() -> None:
    """A tower that learns costs three times a frozen one: the first stage keeps fewer layers."""
    cfg = ModelConfig()
    cfg.language.num_layers = 33
    work = Work(lengths=(2900,) * 4, grids=(((24, 24),) * 20,), supervised=4 * 300)
    parallel = ParallelConfig(pipeline=4)
    frozen, learning = (resolved(cfg, parallel, trained, work).layers for trained in (STAGE2, ALL))
    assert learning[0] < frozen[0]
    assert resolved(cfg, ParallelConfig(pipeline=2, layers=[3, 30]), ALL, work).layers == [3, 30]
    assert resolved(cfg, ParallelConfig(), ALL, work).layers == []


def test_images_that_cannot_be_shared_evenly_cost_the_first_stage_more() -> None:
    """One image a row: of two tensor ranks one embeds it and the other waits."""
    work = Work(lengths=(600,) * 4, grids=(((24, 24),),) * 4, supervised=100)
    split = costs_of(ModelConfig(), ParallelConfig(tensor=2, pipeline=2), STAGE2, work)
    shared = costs_of(ModelConfig(), ParallelConfig(tensor=2, pipeline=2, vision=1), STAGE2, work)
    assert shared.first == pytest.approx(2 * split.first)
    assert shared.layers == split.layers


def test_images_that_every_rank_embeds_cost_the_first_stage_as_often() -> None:
    """Two images a row, over two tensor or context ranks: one each, or both on each (data.vision_cache)."""
    work = Work(lengths=(1200,) * 4, grids=(((24, 24),) * 2,) * 4, supervised=100)
    kept = replace(work, kept=True)

    def first(work: Work, **layout: Any) -> float:
        return costs_of(ModelConfig(), ParallelConfig(pipeline=2, **layout), STAGE2, work).first

    whole = first(work)
    assert first(kept) == first(work, tensor=2, vision=1) == first(work, context=2) == pytest.approx(whole)
    assert first(kept, tensor=2, vision=1) == first(kept, context=2) == pytest.approx(2 * whole)
    assert first(kept, tensor=2, vision=1, context=2) == pytest.approx(4 * whole)
    assert first(kept, tensor=2) == pytest.approx(whole)
    assert first(kept, tensor=2, context=2) == first(work, tensor=2, context=2) == pytest.approx(2 * whole)


def test_a_full_cache_is_told_beside_the_cut() -> None:
    """A new one has to be filled: the cut is that of a tower that runs, and the other is named where it is better."""
    cfg, parallel = ModelConfig(), ParallelConfig(pipeline=2)
    cfg.language.num_layers, cfg.language.num_kv_heads = 8, 8
    work = Work(lengths=(700,) * 4, grids=(((48, 48),) * 4,), supervised=400, kept=True)
    running, resting = (costs_of(cfg, parallel, STAGE2, work, read=read) for read in (False, True))
    assert 0 < resting.first < 0.2 * running.first
    assert (resting.layers, resting.last) == (running.layers, running.last)
    cut, wished = (replace(parallel, layers=balanced(costs, parallel)) for costs in (running, resting))
    assert resolved(cfg, parallel, STAGE2, work) == cut and cut.layers[0] < wished.layers[0]
    now, best = (busiest(stage_costs(resting, one.layers, 2)) for one in (cut, wished))
    named = f"; parallel.layers=[{wished.layers[0]},{wished.layers[1]}] makes that {best:.3f} x"
    (line,) = once_kept(cfg, cut, STAGE2, work)
    assert line.endswith(f"the busiest stage does {now:.3f} x the mean{named}")
    assert once_kept(cfg, wished, STAGE2, work)[0].endswith(f"the busiest stage does {best:.3f} x the mean")
    assert (
        once_kept(cfg, cut, STAGE2, replace(work, kept=False)) == once_kept(cfg, ParallelConfig(), STAGE2, work) == []
    )


def test_megatrons_layout() -> None:
    assert layout([1, 2]) == [["embedding", "decoder"], ["decoder", "decoder", "loss"]]


def test_advice_on_a_cut() -> None:
    costs = Costs(first=2.0, layers=(2.0,) * 9, last=2.0)
    assert better_cut(costs, ParallelConfig(pipeline=3, layers=[2, 4, 3])) == "parallel.layers=[2,4,3]"
    worse = better_cut(costs, ParallelConfig(pipeline=3, layers=[3, 3, 3]))
    assert worse == "parallel.layers=[3,3,3]" or "parallel.layers=[] makes it" in worse
    assert "parallel.layers=[] makes it" in better_cut(costs, ParallelConfig(pipeline=3, layers=[1, 1, 7]))
    heavy = Costs(first=30.0, layers=(2.0,) * 9, last=2.0)
    cut = balanced(heavy, ParallelConfig(pipeline=3))
    assert cut[0] == 0
    assert "lower parallel.pipeline" in better_cut(heavy, ParallelConfig(pipeline=3, layers=cut))
