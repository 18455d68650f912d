"""When stages work and wait, against pictures drawn by hand, the formulas of equal stages and megatron's own order."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from vlm_nemo.check.needs import _enough
from vlm_nemo.check.timeline import Pass, held, order, simulate, warm_up
from vlm_nemo.runtime.config import ParallelConfig


def test_the_first_picture_of_the_docstring() -> None:
    line = simulate([[1], [1]], [[2], [2]], micro=3)
    assert line.total == 12
    assert line.busy == (9, 9)
    assert line.in_flight == (2, 1)
    assert line.bubble == pytest.approx(1 - 18 / 24)
    assert line.balance == 1


def test_the_second_picture_of_the_docstring() -> None:
    pictured = ["FFff.b.bBB", ".FFfbfbBB."]
    line = simulate([[1, 1], [1, 1]], [[1, 1], [1, 1]], micro=2)
    assert line.total == 10
    assert line.busy == (8, 8)
    assert line.in_flight == (4, 3)
    for stage, drawn in enumerate(pictured):
        assert "".join(letter(step) for step in order(stage, 2, 2, 2)) == drawn.replace(".", "")


def letter(step: Pass) -> str:
    return ("Ff" if step.forward else "Bb")[step.chunk]


def test_a_long_first_chunk_holds_up_the_others() -> None:
    """The images are on the first stage's first chunk:

    stage 0   F F F F F F f f . b . b B B
    stage 1   . . . F . . F f b f b B B .
    """
    line = simulate([[3, 1], [1, 1]], [[1, 1], [1, 1]], micro=2)
    assert line.total == 14
    assert line.busy == (12, 8)
    assert line.bubble == pytest.approx(1 - 20 / 28)


def test_a_stage_holds_more_while_it_pairs_forwards_with_backwards() -> None:
    """Four micro-batches, F B and f b: stage 0 does F F f f | F b F b f B f B | b b B B, stage 1 F F | f b ..."""
    assert "".join(map(letter, order(0, 2, 2, 4))) == "FFffFbFbfBfBbbBB"
    assert "".join(map(letter, order(1, 2, 2, 4))) == "FFfbfbFBFBfbfbBB"
    assert held(order(0, 2, 2, 4), 2)[:7] == [(1, 0), (2, 0), (2, 1), (2, 2), (3, 2), (3, 2), (4, 1)]
    line = simulate([[1, 1], [1, 1]], [[1, 1], [1, 1]], micro=4)
    assert line.in_flight == (5, 3)
    assert line.total == 18


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize(("stages", "groups"), [(1, 5), (2, 1), (2, 4), (4, 1), (4, 4), (8, 2)])
def test_equal_chunks_wait_as_the_formula_says(stages: int, groups: int, virtual: int) -> None:
    """(p - 1) / (v m + p - 1): Narayanan et al., 2021, section 2.2. Here over the whole step, not over its work."""
    micro = stages * groups
    line = simulate([[1.0] * virtual] * stages, [[2.0] * virtual] * stages, micro)
    assert line.bubble == pytest.approx((stages - 1) / (virtual * micro + stages - 1))


@pytest.mark.parametrize(("stages", "micro"), [(4, 2), (8, 3), (4, 5)])
def test_one_chunk_takes_any_number_of_micro_batches(stages: int, micro: int) -> None:
    line = simulate([[1.0]] * stages, [[2.0]] * stages, micro)
    assert line.bubble == pytest.approx((stages - 1) / (micro + stages - 1))
    assert line.in_flight == tuple(min(stages - stage, micro) for stage in range(stages))


def test_a_heavy_first_stage_makes_the_others_wait() -> None:
    even = simulate([[1], [1]], [[2], [2]], micro=8)
    heavy = simulate([[3], [1]], [[6], [2]], micro=8)
    assert heavy.bubble > even.bubble
    assert heavy.balance == pytest.approx(1.5)
    assert heavy.total == 8 * 9  # the heavy stage itself never waits
    assert heavy.bubble == pytest.approx(1 - (8 * 9 + 8 * 3) / (2 * 8 * 9))


SHAPES = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))
"""Stages, chunks a stage, micro-batches over stages."""


@settings(deadline=None)
@given(SHAPES)
def test_the_order_is_megatrons(shape: tuple[int, int, int]) -> None:
    """Its tables for graphs that it captures ahead of a step say in which order the schedule will run them."""
    stages, virtual, groups = shape
    micro = stages * groups
    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        place: Any = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        total, _, warm, _ = get_pp_rank_microbatches(micro, virtual, stages, p2p_communicator=place)
        assert min(warm_up(stage, stages, virtual), total) == warm
        said = convert_schedule_table_to_order(warm, virtual, get_schedule_table(micro, virtual, stages))
        found = order(stage, stages, virtual, micro)
        assert [step.chunk + 1 if step.forward else -step.chunk - 1 for step in found] == said
        for kind in (True, False):
            for chunk in range(virtual):  # megatron takes a chunk's micro-batches in turn
                assert [s.micro for s in found if (s.forward, s.chunk) == (kind, chunk)] == list(range(micro))


@settings(deadline=None)
@given(SHAPES, st.data())
def test_no_step_is_shorter_than_its_busiest_stage_or_a_micro_batch(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    stages, virtual, groups = shape
    costs = st.lists(st.floats(0.1, 9), min_size=virtual, max_size=virtual)
    forward, backward = (data.draw(st.lists(costs, min_size=stages, max_size=stages)) for _ in range(2))
    line = simulate(forward, backward, stages * groups)
    through = sum(map(sum, forward)) + sum(map(sum, backward))
    assert line.total >= max(*line.busy, through) * (1 - 1e-9)
    assert line.total <= stages * groups * through * (1 + 1e-9)  # as if one stage at a time worked
    assert 0 <= line.bubble < 1 and line.balance >= 1 - 1e-9


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_one_chunk_is_1f1b(stages: int, micro: int, data: st.DataObject) -> None:
    costs = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    forward, backward = data.draw(costs), data.draw(costs)
    line = simulate([[cost] for cost in forward], [[cost] for cost in backward], micro)
    assert line.total == pytest.approx(one_f_one_b(forward, backward, micro))
    assert line.in_flight == tuple(min(stages - stage, micro) for stage in range(stages))


def one_f_one_b(forward: Sequence[float], backward: Sequence[float], micro: int) -> float:
    """How long 1F1B takes, as its definition says: a forward waits for the stage before, the stage's own forward before
    it, and the backward that 1F1B puts in front of it; a backward likewise."""
    stages = len(forward)
    ends: dict[tuple[str, int, int], float] = {}

    def end(kind: str, stage: int, number: int) -> float:
        if (found := ends.get((kind, stage, number))) is not None:
            return found
        warm = min(stages - stage - 1, micro)
        after = []
        if kind == "F":
            after += [end("F", stage - 1, number)] if stage else []
            after += [end("F", stage, number - 1)] if number else []
            after += [end("B", stage, number - warm - 1)] if number > warm else []
        else:
            after += [end("B", stage + 1, number)] if stage < stages - 1 else []
            after += [end("B", stage, number - 1)] if number else []
            after += [end("F", stage, min(number + warm, micro - 1))]
        cost = forward[stage] if kind == "F" else backward[stage]
        ends[kind, stage, number] = max([0.0, *after]) + cost
        return ends[kind, stage, number]

    return max(end("B", stage, micro - 1) for stage in range(stages))


@pytest.mark.parametrize("virtual", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_what_is_rehearsed_holds_as_much_as_any_longer_step(stages: int, virtual: int) -> None:
    """Every pass of a longer step has its like among the fewer micro-batches, with no chunk held less often: whatever
    chunks weigh, the rehearsal's fullest moment is the step's."""
    parallel = ParallelConfig(pipeline=stages, virtual=virtual)
    for micro in (stages, 2 * stages, 3 * stages, 7 * stages):
        few = _enough(parallel, micro)
        assert few <= micro
        for stage in range(stages):
            short, long = (moments(stage, stages, virtual, count) for count in (few, micro))
            for kind, chunk, counts in long:
                assert any(
                    (kind, chunk) == like[:2] and all(a <= b for a, b in zip(counts, like[2], strict=True))
                    for like in short
                )


def moments(stage: int, stages: int, virtual: int, micro: int) -> set[tuple[bool, int, tuple[int, ...]]]:
    passes = order(stage, stages, virtual, micro)
    return {(s.forward, s.chunk, counts) for s, counts in zip(passes, held(passes, virtual), strict=True)}
