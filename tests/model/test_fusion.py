"""Functions that torch.compile fuses: the same numbers as as written, one kernel for every length, and who decides."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.model.test_head import Alone
from vlm_nemo.model.head import token_losses
from vlm_nemo.model.mlp import Product
from vlm_nemo.model.norm import _rms_norm_plus_one
from vlm_nemo.model.rope import table, turn
from vlm_nemo.model.transformer import quick_gelu
from vlm_nemo.runtime import device, fusion
from vlm_nemo.runtime.fusion import compiled
from vlm_nemo.types import UserError

Function = Callable[..., tuple[Tensor, ...]]
LENGTHS = (24, 17, 40)


def turned(g: torch.Generator, length: int) -> tuple[Function, list[Tensor]]:
    by = table(torch.rand(length, 1, 1, 4, generator=g) * 100, torch.float32)
    q, k = torch.randn(length, 1, 6, 8, generator=g), torch.randn(length, 1, 2, 8, generator=g)
    return lambda q, k: turn(q, k, by), [q, k]


def product(g: torch.Generator, length: int) -> tuple[Function, list[Tensor]]:
    return lambda both: (Product.apply(both),), [torch.randn(length, 1, 24, generator=g)]


def losses(g: torch.Generator, length: int) -> tuple[Function, list[Tensor]]:
    labels, weights = torch.randint(0, 50, (length,), generator=g), torch.rand(length, generator=g)
    given = [torch.randn(length, 16, generator=g) * 2, torch.randn(50, 16, generator=g)]
    # Labels of a half vocabulary: some are another rank's
    return lambda x, head: (token_losses(x, head[:30], labels, weights, Alone()),), given


def gemmas_norm(g: torch.Generator, length: int) -> tuple[Function, list[Tensor]]:
    given = [torch.randn(length, 1, 16, generator=g), torch.randn(16, generator=g)]
    return lambda x, weight: (_rms_norm_plus_one(x, weight, 1e-6),), given


def clips_gelu(g: torch.Generator, length: int) -> tuple[Function, list[Tensor]]:
    return lambda x: (quick_gelu(x),), [torch.randn(length, 1, 16, generator=g)]


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """A C++ compiler that torch can use."""
    if (fault := fusion._tried(torch.device("cpu"))) is not None:
        if "CI" in os.environ:  # there it must run
            pytest.fail(fault)
        pytest.skip(fault)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "make", [turned, product, losses, clips_gelu, pytest.param(gemmas_norm, marks=pytest.mark.slow)]
)
def test_the_same_numbers_of_every_length(
    make: Callable[[torch.Generator, int], tuple[Function, list[Tensor]]], dtype: torch.dtype
) -> None:
    """Values and gradients; on the CPU a kernel may keep fp32 between two roundings to bf16."""
    torch._dynamo.reset()
    counters.clear()
    kernels = []
    for length in LENGTHS:
        g = torch.Generator().manual_seed(length)
        function, given = make(g, length)
        if dtype is torch.bfloat16 and make is turned:
            by = table(torch.rand(length, 1, 1, 4, generator=g) * 100, dtype)
            function = lambda q, k, by=by: turn(q, k, by)  # noqa: E731
        given = [x.to(dtype).requires_grad_() for x in given]
        found = []
        for wanted in ("never", "always"):
            with device.adapter(), compiled(wanted):
                out = function(*given)
                slopes = [torch.cos(torch.arange(x.numel())).view_as(x).to(x.dtype) for x in out]
                found.append([*out, *torch.autograd.grad(out, given, slopes)])
        for as_written, fused in zip(*found, strict=True):
            bound = 2e-6 if dtype is torch.float32 else 1e-2
            assert as_written.dtype == fused.dtype
            assert (as_written - fused).abs().max() <= bound * as_written.abs().max(), length
        kernels.append(counters["stats"]["unique_graphs"])
    assert kernels[0] > 0 and len(set(kernels)) == 1, f"{kernels} kernels after each of the lengths"
    assert not counters["graph_break"]


def test_who_decides(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults = {"cpu": None}
    monkeypatch.setattr(fusion, "_tried", lambda where: faults[where.type])
    with compiled("auto") as on_a_cpu, compiled("always") as always, compiled("never") as never:
        assert (on_a_cpu, always, never, fusion._on) == (False, True, False, False)
    assert not fusion._on
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr(device, "device", lambda: torch.device("cuda", 0))
    with compiled("never") as never:
        assert not never
    faults["cuda"] = None
    with compiled("auto") as on_a_gpu:
        assert on_a_gpu
    faults["cuda"] = "cannot find gcc"
    with caplog.at_level(logging.WARNING), compiled("auto") as broken:
        assert not broken
    assert "torch.compile does not work here (cannot find gcc)" in caplog.text
    with pytest.raises(UserError, match=r"trainer.compile=always, but torch.compile does not work here \(cannot find"):
        compiled("always").__enter__()
    assert not fusion._on


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Callable[..., Tensor]:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", broken)
    assert fusion._tried.__wrapped__(torch.device("cpu")) == "Failed to find C compiler."
