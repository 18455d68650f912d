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


def test_a_decoder_takes_it_and_gives_what_megatrons_gives() -> None:
    cfg = tiny_model()
    x = torch.randn(7, 1, cfg.language.hidden_size)
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        try:
            (model,) = build_model(cfg, ParallelConfig(), "fp32", 0)
            layer = model.language.decoder.layers[0].mlp
            assert isinstance(layer, MLP) and isinstance(layer.activation_func, mlp.SwiGLU)
            found = layer(x)[0]
            layer.config.use_te_activation_func = False
            assert torch.equal(found, layer(x)[0])
        finally:
            groups.stop()


def test_what_is_no_plain_swiglu_keeps_megatrons_way() -> None:
    plain = {"gated_linear_unit": True, "activation_func": F.silu}
    assert mlp.fits(plain, {}) and mlp.fits(plain, {"glu_linear_offset": 0.0})
    assert not mlp.fits(plain, {"glu_linear_offset": 1.0}) and not mlp.fits(plain, {"activation_func_clamp_value": 7.0})
    assert not mlp.fits(plain | {"activation_func": F.gelu}, {}) and not mlp.fits(
        plain | {"gated_linear_unit": False}, {}
    )
