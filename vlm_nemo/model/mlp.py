"""megatron-core's MLP, with the product of a SwiGLU in one function that keeps its input alone for the backward pass.

megatron's own eager form keeps the gate, its SiLU and the other factor, adds an offset that is always zero, and joins
two gradients into a third tensor. At LLaVA-1.5 7B's width this one keeps 44 KB a token and layer less.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import functional as F


class GatedMLP(MLP):
    """[T, 1, D] -> [T, 1, D], and the bias that is still to be added or None. As MLP, whatever is not a SwiGLU."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **given: Any) -> Any:
        config = self.config
        plain = not (config.use_te_activation_func or config.bias_activation_fusion or config.add_bias_linear)
        limited = config.activation_func_clamp_value is not None or config.glu_linear_offset
        swiglu = config.gated_linear_unit and config.activation_func is F.silu
        if per_token_scale is not None or limited or not (plain and swiglu):
            return super().forward(hidden_states, per_token_scale, **given)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(Product.apply(both))


class Product(torch.autograd.Function):
    """[…, 2 F], gate and up side by side, -> silu(gate) * up [..., F]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return out
