"""Which kernels compute: the one place that knows TransformerEngine, apex and FlashAttention.

Each is used where it is installed and CUDA is there, and its absence is silent. Where none is, megatron-core's layers,
torch's norms and torch's variable-length attention compute the same. Parameters have the same names and shapes either
way (norms stay apart from the products behind them), so that checkpoints do not depend on the choice.

    what                        TransformerEngine        apex                       otherwise
    linear layers of a layer    its linears, FP8 too     gradients added in place   megatron-core's
    norms of a layer            its norms                RMSNorm's kernel           torch's
    packed attention            FlashAttention 3, else 2, else torch's own: it cuts samples, windows and blocks apart
    what stands between them    torch.compile (vlm_nemo/runtime/fusion.py), where the recipe has it
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from vlm_nemo.model.norm import Norm
from vlm_nemo.runtime import device
from vlm_nemo.types import UserError


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What a transformer layer is made of. megatron-core builds all of them with the same arguments."""

    norm: Any = Norm
    column: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    fused_gradients: bool = False
    """A weight's gradient is added to its fp32 buffer by the matrix product that makes it."""


PLAIN = Kernels()


class ApexNorm(Norm):
    """Norm with apex's kernel for RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.rms or self.plus_one:
            return super().forward(x)
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)


def choose(wanted: str, fp8: str = "none") -> Kernels:
    """wanted: auto | plain | te; fp8: none | hybrid | e4m3. Raises UserError for what is not there."""
    engine = wanted != "plain" and device.on_cuda() and has("transformer_engine.pytorch")
    if wanted == "te" and not engine:
        raise UserError(
            "model.kernels=te needs TransformerEngine and a GPU; pip install 'vlm_nemo[te]' there, or set "
            "model.kernels=auto"
        )
    if fp8 != "none" and not engine:
        raise UserError(f"model.fp8={fp8} needs TransformerEngine's layers (model.kernels=te); set model.fp8=none")
    apex = wanted != "plain" and device.on_cuda()
    # megatron-core's own layers, which the head stays, ask for apex's extension by that name
    fused = apex and has("fused_weight_gradient_mlp_cuda")
    if engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        return Kernels(norm=TENorm, column=TEColumnParallelLinear, row=TERowParallelLinear, fused_gradients=fused)
    norm = ApexNorm if apex and has("fused_layer_norm_cuda") and has("apex.normalization.fused_layer_norm") else Norm
    return Kernels(norm=norm, fused_gradients=fused)


def flash_attention() -> Callable[..., Any] | None:
    """FlashAttention's kernel for packed rows: 3 where it is installed and the GPU is a Hopper, else 2, else None."""
    return _flash(device.on_cuda() and device.capability() == 9)


@functools.cache
def _flash(hopper: bool) -> Callable[..., Any] | None:
    for module in ("flash_attn_interface", "flash_attn") if hopper else ("flash_attn",):
        if has(module):
            return importlib.import_module(module).flash_attn_varlen_func
    return None


def flash_varlen(
    kernel: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor, int, int],
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """q: [T, heads, d], k and v: [K, kv_heads, d] -> [T, heads, d].

    ends: [segments + 1] int32 of queries, of keys, and the longest segment of each; causal is counted from a segment's
    end. window: tokens that a query sees, itself included; None = all.
    """
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    out = kernel(q.contiguous(), k.contiguous(), v.contiguous(), *ends, **options)
    return out[0] if isinstance(out, tuple) else out  # the first versions of 3 gave the log-sums too


@functools.cache
def has(module: str) -> bool:
    """Whether it can be imported; one that is broken (built for another CUDA) is as good as absent."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
