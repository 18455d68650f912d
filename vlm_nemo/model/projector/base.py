"""What every projector is: features of a row's views in, embeddings for the language model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.reduce import reduce, reduced_width
from vlm_nemo.model.transformer import ACTIVATIONS, transformer_config
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


class Projector(MegatronModule):
    """[N, D_vision] of views -> [E, D_language]. The reduction, and the norm before or behind it, are here."""

    def __init__(self, cfg: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        own = cfg.projector
        self.reduction = cfg.reduce
        self.width_in = reduced_width(cfg.vision.feature_size, cfg.reduce)
        self.norm_place = None if own.norm == "none" else own.norm_place
        if self.norm_place is not None:
            width = cfg.vision.feature_size if self.norm_place == "patch" else self.width_in
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


class Layers(nn.ModuleList):
    """Layers that each say how the tensor group splits them; a plain ModuleList's would count as whole."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        found: ShardedStateDict = {}
        for n, layer in enumerate(self):
            found.update(sharded_state_dict_default(layer, f"{prefix}{n}.", sharded_offsets, metadata))
        return found


def projector_config(
    cfg: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    width: int,
    inner: int,
    heads: int,
    **sizes: Any,
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
        layernorm_epsilon=own.norm_eps,
        add_bias_linear=own.bias,
        **sizes,
    )


def divides(parallel: ParallelConfig, **sizes: int) -> None:
    """Raises UserError for the first of these keys of `model` (dots as __) that parallel.tensor does not divide."""
    for key, size in sizes.items():
        if size % parallel.tensor:
            raise UserError(
                f"model.{key.replace('__', '.')}={size} is not a multiple of parallel.tensor={parallel.tensor}"
            )
