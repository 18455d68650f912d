"""What every projector is: features of a row's views in, embeddings for the language model out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.reduce import reduce, reduced_width
from vlm_nemo.model.transformer import ACTIVATIONS, transformer_config
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime.config import ParallelConfig

NORMS = {"none": "RMSNorm", "layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "gemma": "RMSNorm"}
"""Our names of norms to megatron's."""


class Projector(MegatronModule):
    """[N, D_vision] of views -> [E, D_language]. The norm and the reduction that come first are here."""

    def __init__(self, cfg: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        own = cfg.projector
        self.reduction, self.norm_place = cfg.reduce, own.norm_place
        self.width_in = reduced_width(cfg.vision.hidden_size, cfg.reduce)
        self.norm: nn.Module = nn.Identity()
        if own.norm != "none":
            width = cfg.vision.hidden_size if own.norm_place == "patch" else self.width_in
            self.norm = Norm(config, width, own.norm_eps)
        self.newline = None
        if own.newline:
            self.newline = nn.Parameter(torch.empty(cfg.language.hidden_size, dtype=config.params_dtype))

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """features: [N, D] of all views one after the other, class tokens among them where the tower keeps them."""
        if self.norm_place == "patch":
            features = self.norm(features)
        features, left = reduce(features, grids, self.reduction)
        if self.norm_place == "reduced":
            features = self.norm(features)
        return self.project(features, left)

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[N', D'] -> [E, D_language], the grids those that the reduction left."""
        raise NotImplementedError

    def extra_rows(self) -> Tensor | None:
        """[K, D_language]: what stands at placeholders whose source is -1 - k."""
        return None if self.newline is None else self.newline[None]


def projector_config(
    cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, width: int, inner: int, heads: int
) -> TransformerConfig:
    """megatron's config of a projector of this width, with `inner` channels inside its MLPs."""
    own = cfg.projector
    return transformer_config(
        parallel,
        dtype,
        pipelined=False,
        num_layers=own.num_layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        activation_func=ACTIVATIONS[own.activation],
        normalization=NORMS[own.norm],
        layernorm_zero_centered_gamma=own.norm == "gemma",
        layernorm_epsilon=own.norm_eps,
        add_bias_linear=own.bias,
    )
