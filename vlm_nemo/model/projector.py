"""The projector: vision features to language embeddings."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vlm_nemo.model.config import ProjectorConfig
from vlm_nemo.model.transformer import ACTIVATIONS, mlp_spec, transformer_config
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


class Projector(MegatronModule):
    """[N, P, D_vision] -> [N, P, D_language]. One layer (LLaVA) or linear-activation-linear (LLaVA-1.5)."""

    def __init__(
        self, cfg: ProjectorConfig, width_in: int, width_out: int, parallel: ParallelConfig, dtype: torch.dtype
    ) -> None:
        if cfg.num_layers not in (1, 2):
            raise UserError(f"model.projector.num_layers is {cfg.num_layers}; choose 1 or 2")
        config = transformer_config(
            parallel,
            dtype,
            pipelined=False,
            num_layers=1,
            hidden_size=width_out,
            ffn_hidden_size=width_out,
            num_attention_heads=parallel.tensor,  # unused, but megatron checks that tensor divides it
            activation_func=ACTIVATIONS[cfg.activation],
            add_bias_linear=True,
        )
        super().__init__(config=config)
        self.layers: MLP | ColumnParallelLinear
        if cfg.num_layers == 2:
            self.layers = MLP(config, mlp_spec(), input_size=width_in, ffn_hidden_size=width_out)
        else:
            self.layers = ColumnParallelLinear(
                width_in, width_out, config=config, init_method=config.init_method, gather_output=True
            )

    def forward(self, features: Tensor) -> Tensor:
        out, bias = self.layers(features)
        return out if bias is None else out + bias
