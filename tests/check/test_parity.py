"""Layouts compared with one process: alike in a sound model, and not where a fault is planted in the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests import warm
from vlm_nemo.check import parity as parities
from vlm_nemo.check.made import Subject
from vlm_nemo.check.parity import CASES, Differences, own, parity
from vlm_nemo.model.config import MoeConfig
from vlm_nemo.runtime import processes
from vlm_nemo.runtime.config import ParallelConfig

MEAN_LOSS = """
def mean(losses, loss_mask):
    total, count, report = real(losses, loss_mask)
    return total / count, count // count, report / report[1]

from vlm_nemo.train import step
real, step.token_loss = step.token_loss, mean
"""
"""Each micro-batch's mean, as if all had equally many tokens."""
UNSHARED = """
from vlm_nemo.model import vlm
vlm.mark_shared = lambda module: None
"""
"""Every rank's tower keeps the gradients of its own images."""
LONELY_PROJECTOR = """
from megatron.core import parallel_state
from vlm_nemo.check import trial

def build_model(*given, **named):
    chunks = real(*given, **named)
    if parallel_state.get_tensor_model_parallel_rank() == 1:
        for name, parameter in chunks[0].projector.named_parameters():
            parameter.register_hook(lambda gradient: gradient * 0.9)
    return chunks

real, trial.build_model = trial.build_model, build_model
"""
"""The second tensor rank's projector gets a gradient of its own."""


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that the comparison starts runs `fault` first."""

    def run_ranks(function: Callable[..., Any], world: int, *given: Any, **how: Any) -> list[Any]:
        return processes.run_ranks(planted, world, fault, function, *given, context=warm.context(), **how)

    monkeypatch.setattr(parities, "run_ranks", run_ranks)


def planted(fault: str, function: Callable[..., Any], *given: Any) -> Any:
    exec(fault, {})
    return function(*given)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These cases alone, without the recipe's own layout."""
    monkeypatch.setattr(parities, "CASES", {name: CASES[name] for name in names})
    monkeypatch.setattr(parities, "own", lambda parallel: {})


def test_a_sound_model_passes(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("", monkeypatch)
    names = [
        "packed, two rows at once",
        "tensor 2, sequence, recompute",
        "pipeline 2, virtual 2",
        "context 2",
        "data 2, distributed optimizer",
    ]
    only(monkeypatch, *names)
    found = parity(small, ParallelConfig(tensor=8, sequence=True))
    assert found.ok and found.state == "ok", found
    assert [layout["name"] for layout in found.data["layouts"]] == names
    for layout in found.data["layouts"]:
        assert set(layout["gradients"]) == {
            "vision", "projector", "embedding", "attention", "mlp", "norms", "head"
        }  # fmt: skip
        assert 0 < max(layout["gradients"].values()) < 1e-5


@pytest.mark.slow
def test_every_layout(small: Subject) -> None:
    found = parity(small, ParallelConfig())
    assert found.ok, found.verdict
    dense = [name for name in CASES if "expert" not in name]
    assert [layout["name"] for layout in found.data["layouts"]] == dense
    assert not found.data["left_out"]


WIDE = ParallelConfig(
    tensor=8, sequence=True, vision=1, context=4, expert=16, pipeline=4, virtual=3, layers=[3] * 12, recompute="full"
)


def test_a_recipes_own_layout_is_tried_small_where_no_case_is_the_same() -> None:
    """Whatever its sizes are: two of each at most, and two replicas where that leaves ranks."""
    (name,) = own(WIDE)
    assert name == (
        "the recipe's: tensor 2, vision 1, pipeline 2, virtual 2, context 2, expert 2, sequence, "
        "distributed optimizer, recompute full"
    )
    world, rows, fields = own(WIDE)[name]
    assert (world, rows) == (8, "packed") and fields["expert"] == 2 and "layers" not in fields
    assert [world for world, *_ in own(ParallelConfig(tensor=4, vision=1)).values()] == [4]
    same = [{}, dict(tensor=8, sequence=True), dict(pipeline=4), dict(pipeline=4, layers=[1, 2, 2, 3])]
    assert [own(ParallelConfig(**layout)) for layout in same] == [{}] * 4  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_recipes_own_layout_of_everything(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes: experts over data and context ranks, shared images, stages of two chunks."""
    monkeypatch.setattr(parities, "CASES", {"packed": CASES["packed"]})
    moe = MoeConfig(experts=4, ffn_hidden_size=24, shared_ffn_hidden_size=16, shared_gate=True, aux_loss=0.05)
    model = replace(small.model, language=replace(small.model.language, moe=moe))
    found = parity(replace(small, model=model), WIDE)
    assert found.ok and not found.data["left_out"], found
    assert [layout["processes"] for layout in found.data["layouts"]] == [1, 8]


@pytest.mark.slow
def test_every_spread_of_experts(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in CASES if "expert" in name]
    only(monkeypatch, *names)
    moe = MoeConfig(experts=4, ffn_hidden_size=24, aux_loss=0.05, z_loss=0.01)
    model = replace(small.model, language=replace(small.model.language, moe=moe))
    found = parity(replace(small, model=model), ParallelConfig())
    assert found.ok and not found.data["left_out"], found
    assert [layout["name"] for layout in found.data["layouts"]] == names
    assert {"router", "experts"} < set(found.data["layouts"][0]["gradients"])


def test_a_mean_loss_per_micro_batch_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "packed")
    plant(MEAN_LOSS, monkeypatch)
    found = parity(small, ParallelConfig())
    assert not found.ok
    (layout,) = found.data["layouts"]
    assert layout["loss"] > 1e-3 and min(layout["gradients"].values()) > 1e-2
    assert found.tables[0].bad == {0}
    assert found.verdict.startswith("1 of 1 layouts differ from one process; packed: the loss differs by")


def test_a_projector_that_tensor_ranks_do_not_share_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "packed", "tensor 2")
    plant(LONELY_PROJECTOR, monkeypatch)
    found = parity(small, ParallelConfig())
    alone, split = found.data["layouts"]
    assert alone["broken"] == []
    # Adam's first update does not care how long a gradient is: no loss says so
    assert [words.split(" differs")[0] for words in split["broken"]] == ["the gradient of projector"]
    assert found.tables[0].bad == {1}


def test_a_tower_whose_gradients_are_not_brought_together_is_found(
    small: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "packed", "tensor 2, images shared out")
    plant(UNSHARED, monkeypatch)
    alone, shared = parity(small, ParallelConfig()).data["layouts"]
    assert alone["broken"] == []
    broken = [words.split(" differs")[0] for words in shared["broken"]]
    assert "the gradient of vision" in broken and "the gradient of projector" in broken


def test_what_is_no_number_is_a_difference() -> None:
    one = Differences(case="tensor 2", world=2, loss=math.nan, norm=0.0, later=0.0, modules={"mlp": 0.0})
    assert one.broken == ["the loss differs by nan (bound 1e-05)"]
