"""Layer norms for megatron-core's layers, on any device, aware of sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.runtime.fusion import fused


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says. x: [..., D] -> [..., D].

    With `config.layernorm_zero_centered_gamma` it is Gemma's: RMSNorm times 1 + weight, in fp32.

    Under sequence parallelism every tensor rank sees other tokens, so the gradients of weight and bias are partial;
    megatron sums them over the tensor group for parameters that carry `sequence_parallel = True`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.plus_one = config.layernorm_zero_centered_gamma
        fill = torch.zeros if self.plus_one else torch.ones
        self.weight = nn.Parameter(fill(hidden_size, dtype=config.params_dtype))
        if not self.rms:
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_one:
            return _rms_norm_plus_one(x, self.weight, self.eps)
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@fused
def _rms_norm_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32: 1 + weight would lose the weight's last bits."""
    return F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).to(x.dtype)
