"""A SwiGLU's product in one function: the values and gradients of torch's own operations, and less to keep."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from torch.nn import functional as F

from tests.tiny import tiny_model
from vlm_nemo.model import mlp
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_silu_times_up(dtype: torch.dtype) -> None:
    both = torch.randn(5, 1, 12, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 1, 6, dtype=dtype)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = mlp.Product.apply(both)
    assert kept == [60], "its input, and nothing else"
    found.backward(grad)
    ours, both.grad = both.grad, None
    gate, up = both.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(grad)
    assert torch.equal(found, expected) and torch.equal(ours, both.grad)


def test_numerical_gradient() -> None:
    both = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp.Product.apply, (both,))


def test_a_decoder_takes_it_and_gives_what_megatrons_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_model()
    x = torch.randn(7, 1, cfg.language.hidden_size)
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        try:
            (model,) = build_model(cfg, ParallelConfig(), "fp32", 0)
            layer = model.language.decoder.layers[0].mlp
            calls = []
            real = mlp.Product.forward
            monkeypatch.setattr(mlp.Product, "forward", staticmethod(lambda *a: calls.append(1) or real(*a)))
            found = layer(x)[0]
            assert calls and torch.equal(found, MLP.forward(layer, x)[0])
        finally:
            groups.stop()
