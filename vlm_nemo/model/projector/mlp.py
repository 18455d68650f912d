"""Linear layers with an activation between them: LLaVA's one, LLaVA-1.5's and InternVL's two, or more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.projector.base import Layers, Projector, divides, projector_config
from vlm_nemo.model.transformer import ACTIVATIONS, mlp_spec
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

NORMS = {"none": "RMSNorm", "layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "gemma": "RMSNorm"}
"""Our names of norms to megatron's."""


class MLPProjector(Projector):
    """`layers` linear layers. One alone gives whole outputs; of several, each is split over the tensor group."""

    def __init__(self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, layers: int) -> None:
        own, width_out = cfg.projector, cfg.language.hidden_size
        inner = own.hidden_size or width_out
        if layers < 1:
            raise UserError(f"model.projector.num_layers is {layers}; at least 1 is needed")
        divides(parallel, projector__hidden_size=inner, language__hidden_size=width_out)
        config = projector_config(
            cfg,
            parallel,
            dtype,
            width=width_out,
            inner=inner,
            heads=parallel.tensor,  # not used, but megatron checks that tensor divides it
            normalization=NORMS[own.norm],
            layernorm_zero_centered_gamma=own.norm == "gemma",
        )
        super().__init__(cfg, config)
        self.activation = ACTIVATIONS[own.activation]
        self.layers: nn.Module
        if layers == 1:
            self.layers = self.linear(self.width_in, width_out, last=True)
        elif layers == 2:
            self.layers = MLP(
                self.config,
                mlp_spec(),
                input_size=self.width_in,
                ffn_hidden_size=inner,
                tp_group=groups.vision_group(),
            )
        else:
            widths = [self.width_in, *[inner] * (layers - 1), width_out]
            self.layers = Layers(
                self.linear(widths[n], widths[n + 1], last=n == layers - 1, row=n % 2 == 1) for n in range(layers)
            )

    def linear(self, width_in: int, width_out: int, *, last: bool, row: bool = False) -> nn.Module:
        """Split by columns, or by rows where the layer before was split by columns."""
        shared = {
            "config": self.config,
            "init_method": self.config.init_method,
            "bias": self.config.add_bias_linear,
            "tp_group": groups.vision_group(),
        }
        if row:
            return RowParallelLinear(width_in, width_out, input_is_parallel=True, skip_bias_add=False, **shared)
        return ColumnParallelLinear(width_in, width_out, gather_output=last, **shared)

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        if isinstance(self.layers, Layers):
            x = features
            for n, layer in enumerate(self.layers):
                x, _ = layer(x if n == 0 else self.activation(x))
            return x
        out, bias = self.layers(features)
        return out if bias is None else out + bias
