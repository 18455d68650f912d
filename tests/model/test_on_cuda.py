"""The lines that only CUDA runs, on tensors that say they are there and hold nothing (tests/pretended.py).

A wrong device, type or shape raises there as it would on a GPU; so does a look at a value, which would stop the host.
What kernels compute nobody sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.on_cuda import FEWER, Case, alone, asked, build
from tests.pretended import Attention, pretend
from vlm_nemo.model import attention, vlm
from vlm_nemo.model.segments import make_segments
from vlm_nemo.runtime.config import ParallelConfig


def waits_of(guard: Path, cases: list[Case]) -> list[tuple[dict[str, int], dict[str, int], set[Attention]]]:
    """Of each: what the host waited for while the rows were moved, and in the step; and what attention was asked."""
    found = []
    for case in cases:
        with pretend(guard, ParallelConfig(**case.layout), world=case.world, rank=case.rank) as gpu:
            run = build(gpu, case)
            batches = run.batches()
            moved, gpu.waits = dict(gpu.waits), Counter()
            with gpu.running():
                assert run.step(batches).applied
            found.append((moved, dict(gpu.waits), {replace(asked, segments=0) for asked in gpu.attention}))
    return found


def wait_once(guard: Path, cases: list[tuple[Case, set[Attention]]]) -> None:
    for found, (_, wanted) in zip(alone(waits_of, guard, [case for case, _ in cases]), cases, strict=True):
        assert found == ({}, {"tolist": 1}, wanted)


TOWER = Attention(heads=4, kv_heads=4, dim=16, segments=0, causal=False, window=(-1, -1), more_keys=False)
Wanted = dict[str, list[tuple[Case, set[Attention]]]]
FAMILIES: Wanted = {
    "llava": [
        (Case(stage=1), {asked()}),
        (Case(layout=dict(recompute="selective")), {asked()}),
        (Case(language="qwen2", stage=3, layout=dict(recompute="full", recompute_vision="full")), {asked()}),
    ],
    "qwen2.5-vl": [
        (Case(tower="qwen25_vit", reduction="merge", language="qwen2_vl", stage=3), {asked(), TOWER}),
    ],
    "gemma3": [
        (
            Case(tower="siglip", reduction="average_pool", projector="gemma", language="gemma3", stage=3),
            {asked(), asked(window=(7, 0))},
        ),
        (Case(language="mistral", stage=1), {asked(window=(5, 0))}),
        (Case(language="mistral", head_dim=12), set()),  # the kernel would refuse these heads
        (Case(language="gemma3", head_dim=264), set()),
    ],
    "llama3.2": [(Case(tower="llama32", projector="cross_attention"), {asked()})],
    "ovis": [(Case(tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary", stage=3), {asked()})],
    "mixtral": [
        (Case(experts=4), {asked()}),
        (Case(experts=4, layout=dict(expert=2, recompute="selective"), world=2), {asked()}),
    ],
    "fp32": [(Case(tower="qwen2_vit", reduction="merge", language="gemma3", precision="fp32"), set())],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_once(guard: Path, family: str) -> None:
    """And nothing waits while rows are moved. Attention goes through the variable-length kernel, window and all. (How
    many tokens an expert gets is made up on shapes; on a GPU its layer waits for that, see Dispatcher.)"""
    wait_once(guard, FAMILIES[family])


LAYOUTS: Wanted = {
    "tensor": [
        (Case(layout=dict(tensor=2), world=2), {asked(heads=2, kv_heads=1)}),
        (
            Case(language="gemma3", layout=dict(tensor=2, sequence=True, vision=1), world=2, rank=1),
            {asked(heads=2, kv_heads=1), asked(heads=2, kv_heads=1, window=(7, 0))},
        ),
    ],
    "context": [
        (Case(language="mistral", layout=dict(context=2), world=2), {asked(window=(5, 0), more_keys=True)}),
        (
            Case(language="gemma3", stage=1, layout=dict(context=2), world=2, rank=1),
            {asked(more_keys=True), asked(window=(7, 0), more_keys=True)},
        ),
    ],
    "data": [
        (Case(layout=dict(overlap_grad_reduce=True, overlap_param_gather=True), world=2), {asked()}),
        (Case(layout=dict(distributed_optimizer=False), world=2), {asked()}),
    ],
    "pipeline": [(Case(language="qwen2", layout=dict(pipeline=2), world=2, rank=rank), {asked()}) for rank in (0, 1)],
    "interleaved": [(Case(layout=dict(pipeline=2, virtual=2), world=2, rank=rank), {asked()}) for rank in (0, 1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_does_every_layout(guard: Path, layout: str) -> None:
    wait_once(guard, LAYOUTS[layout])


SEEN = {
    "copy to cuda": [
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.zeros(3).to(x.device, non_blocking=True),  # it is not pinned
        lambda x: x[0].copy_(torch.zeros(4)),
        lambda x: x[[1, 0]],
    ],
    "copy to cpu": [lambda x: x.cpu(), lambda x: torch.empty(2, 4).copy_(x, non_blocking=True)],
    "index from the host": [lambda x: x[torch.tensor([0, 1])]],
    "synchronize": [lambda x: torch.cuda.synchronize()],
    "tolist": [lambda x: x.tolist()],
}
"""What is counted, and what must be counted so."""
RAISES: dict[type[Exception], list[Callable[[Tensor], object]]] = {
    DataDependentOutputException: [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0, 0])],
    DynamicOutputShapeException: [Tensor.nonzero, lambda x: x[x > 0]],
    RuntimeError: [lambda x: x + torch.ones(2, 4), lambda x: torch.cat((x, torch.ones(2, 4)))],
}


def planted(guard: Path) -> None:
    """What this file looks for is seen where it is put."""
    with pretend(guard) as gpu, gpu.running():
        x = torch.empty(2, 4, device="cuda")
        for name, plants in SEEN.items():
            for number, plant in enumerate(plants):
                gpu.waits.clear()
                plant(x)
                assert gpu.waits == {name: 1}, (name, number, gpu.waits)
        for error, plants in RAISES.items():
            for plant in plants:
                with pytest.raises(error, match="device" if error is RuntimeError else None):
                    plant(x)
        gpu.waits.clear()
        pinned = torch.empty(2, 4, pin_memory=True)
        pinned[:1].copy_(x[:1], non_blocking=True)
        x[1].fill_(0)[x[1] > 0] = 1
        assert not gpu.waits, "none of these waits"


def planted_in_a_step(guard: Path) -> dict[str, int]:
    with pretend(guard) as gpu:
        run = build(gpu, Case())
        batches, real = run.batches(), vlm.place_images

        def looking(x: Tensor, *given: Any) -> Tensor:
            one = torch.ones(1, dtype=torch.int64)
            x.register_hook(lambda grad: grad * one.to(grad.device))  # in the backward pass
            return real(x * one.to(x.device), *given)

        vlm.place_images = looking  # type: ignore[assignment]
        with gpu.running():
            run.step(batches)
        return dict(gpu.waits)


def test_what_is_planted_is_seen(guard: Path) -> None:
    alone(planted, guard)
    assert alone(planted_in_a_step, guard) == {"tolist": 1, "copy to cuda": 4}, "two rows, there and back"


def kernel_calls(guard: Path) -> None:
    """What torch 2.11 takes: no flag for fewer heads of keys, which are repeated for it."""
    with pretend(guard) as gpu:
        segments = make_segments(torch.tensor([0, 24, 64], dtype=torch.int32), 64)
        with gpu.running():
            segments = segments.moved(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
            q, k, v = (
                torch.empty(64, heads, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for heads in (4, 2, 2)
            )
            attention.packed_attention(q, k, v, segments, 0.1, 8).sum().backward()
            attention._varlen_takes_fewer = lambda: False  # type: ignore[assignment]
            attention.packed_attention(q, k, v, segments, None).sum().backward()
            assert k.grad is not None and k.grad.shape == k.shape and k.grad.is_cuda
        first, second = gpu.attention
        assert (first.kv_heads, first.window, first.causal, first.segments) == (2 if FEWER else 4, (7, 0), False, 2)
        assert (second.kv_heads, second.window, second.causal) == (4, (-1, 0), True)


def test_the_kernel_of_torch_2_11(guard: Path) -> None:
    alone(kernel_calls, guard)
