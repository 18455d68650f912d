"""Linear layers with an activation between them: LLaVA's one, LLaVA-1.5's and InternVL's two, or more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.projector.base import Projector, projector_config
from vlm_nemo.model.transformer import ACTIVATIONS, mlp_spec
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


class MLPProjector(Projector):
    """num_layers linear layers. One alone gives whole outputs; of several, each is split over the tensor group."""

    def __init__(self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        own, width_out = cfg.projector, cfg.language.hidden_size
        inner = own.hidden_size or width_out
        # the heads are not used, but megatron checks that tensor divides them
        super().__init__(
            cfg, projector_config(cfg, parallel, dtype, width=width_out, inner=inner, heads=parallel.tensor)
        )
        if own.num_layers < 1:
            raise UserError(f"model.projector.num_layers is {own.num_layers}; at least 1 is needed")
        for key, size in {"projector.hidden_size": inner, "language.hidden_size": width_out}.items():
            if size % parallel.tensor:
                raise UserError(f"model.{key}={size} is not a multiple of parallel.tensor={parallel.tensor}")
        self.activation = ACTIVATIONS[own.activation]
        self.layers: nn.Module
        if own.num_layers == 1:
            self.layers = self.linear(self.width_in, width_out, last=True)
        elif own.num_layers == 2:
            self.layers = MLP(self.config, mlp_spec(), input_size=self.width_in, ffn_hidden_size=inner)
        else:
            widths = [self.width_in, *[inner] * (own.num_layers - 1), width_out]
            self.layers = nn.ModuleList(
                self.linear(widths[n], widths[n + 1], last=n == own.num_layers - 1, row=n % 2 == 1)
                for n in range(own.num_layers)
            )

    def linear(self, width_in: int, width_out: int, *, last: bool, row: bool = False) -> nn.Module:
        """Split by columns, or by rows where the layer before was split by columns."""
        shared = {"config": self.config, "init_method": self.config.init_method, "bias": self.config.add_bias_linear}
        if row:
            return RowParallelLinear(width_in, width_out, input_is_parallel=True, skip_bias_add=False, **shared)
        return ColumnParallelLinear(width_in, width_out, gather_output=last, **shared)

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        if isinstance(self.layers, nn.ModuleList):
            x = features
            for n, layer in enumerate(self.layers):
                x, _ = layer(x if n == 0 else self.activation(x))
            return x
        out, bias = self.layers(features)
        return out if bias is None else out + bias
