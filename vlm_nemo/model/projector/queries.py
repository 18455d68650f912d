"""Learned queries that read a view and give as many embeddings whatever its size: Q-Former and Perceiver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.projector.attention import CrossAttention, SelfAttention, column
from vlm_nemo.model.projector.base import Layers, Projector, divides, projector_config
from vlm_nemo.model.transformer import mlp_spec
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


class QueryProjector(Projector):
    """What both have: the queries, and how many features each view has."""

    def __init__(
        self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, normalization: str, gated: bool
    ) -> None:
        own, out = cfg.projector, cfg.language.hidden_size
        width = own.hidden_size or out
        kv_heads = own.num_kv_heads or own.num_heads
        inner = own.ffn_hidden_size or 4 * width
        if own.head_dim is None and width % own.num_heads:
            raise UserError(
                f"model.projector.num_heads={own.num_heads} does not divide its width {width}; set "
                "model.projector.head_dim, or another number of heads"
            )
        if own.num_heads % kv_heads:
            raise UserError(f"model.projector.num_heads={own.num_heads} is not a multiple of num_kv_heads={kv_heads}")
        divides(
            parallel,
            projector__num_heads=own.num_heads,
            projector__num_kv_heads=kv_heads,
            projector__ffn_hidden_size=inner,
            language__hidden_size=out,
        )
        config = projector_config(
            cfg,
            parallel,
            dtype,
            width=width,
            inner=inner,
            heads=own.num_heads,
            num_query_groups=kv_heads,
            kv_channels=own.head_dim or width // own.num_heads,
            normalization=normalization,
            gated_linear_unit=gated,
        )
        super().__init__(cfg, config)
        self.class_tokens = int(cfg.vision.class_token and cfg.vision.keep_class_token)
        self.queries = nn.Parameter(torch.empty(own.num_queries, width, dtype=dtype))
        self.norm = Norm(config, width, own.norm_eps)

    def lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Features of every view."""
        return [rows * columns + self.class_tokens for rows, columns in grids]


class QFormer(QueryProjector):
    """BLIP-2's: queries look at one another, in some layers at the view, then go through an MLP; norms come last."""

    def __init__(self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        super().__init__(cfg, parallel, dtype, normalization="LayerNorm", gated=False)
        own = cfg.projector
        self.layers = Layers(
            QFormerLayer(self.config, self.width_in if n % own.cross_attention_every == 0 else None)
            for n in range(own.num_layers)
        )
        self.output = column(self.config, self.config.hidden_size, cfg.language.hidden_size, gather=True)

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        lengths = self.lengths(grids)
        x = self.norm(self.queries).expand(len(lengths), -1, -1)
        for layer in self.layers:
            x = layer(x, features, lengths)
        return self.output(x.flatten(0, 1))[0]


class QFormerLayer(MegatronModule):
    """[V, Q, D] -> the same. context_width None: this layer does not look at the view."""

    def __init__(self, config: TransformerConfig, context_width: int | None) -> None:
        super().__init__(config=config)
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.self_attention, self.self_attention_norm = SelfAttention(config), Norm(config, width, eps)
        self.looks = context_width is not None
        if context_width is not None:
            self.cross_attention = CrossAttention(config, context_width)
            self.cross_attention_norm = Norm(config, width, eps)
        self.mlp, self.mlp_norm = (
            MLP(config, mlp_spec(), ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.vision_group()),
            Norm(config, width, eps),
        )

    def forward(self, x: Tensor, context: Tensor, lengths: Sequence[int]) -> Tensor:
        x = self.self_attention_norm(x + self.self_attention(x))
        if self.looks:
            x = self.cross_attention_norm(x + self.cross_attention(x, context, lengths))
        return self.mlp_norm(x + through(self.mlp, x))


class Perceiver(QueryProjector):
    """Idefics2's resampler: in every layer queries look at the view and at themselves, then go through a gated MLP.

    The view's features are brought to the queries' width first, and the queries to the language model's at the end
    where that is another one.
    """

    def __init__(self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        super().__init__(cfg, parallel, dtype, normalization="RMSNorm", gated=True)
        width = self.config.hidden_size
        divides(parallel, projector__hidden_size=width)
        self.input = column(self.config, self.width_in, width, gather=True)
        self.layers = Layers(PerceiverLayer(self.config) for _ in range(cfg.projector.num_layers))
        self.output = None
        if width != cfg.language.hidden_size:
            self.output = column(self.config, width, cfg.language.hidden_size, gather=True)

    def project(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        lengths = self.lengths(grids)
        context, _ = self.input(features)
        x = self.queries.expand(len(lengths), -1, -1)
        for layer in self.layers:
            x = layer(x, context, lengths)
        x = self.norm(x).flatten(0, 1)
        return x if self.output is None else self.output(x)[0]


class PerceiverLayer(MegatronModule):
    """[V, Q, D] -> the same."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.query_norm, self.context_norm = Norm(config, width, eps), Norm(config, width, eps)
        self.cross_attention = CrossAttention(config, width)
        self.mlp_norm, self.mlp = (
            Norm(config, width, eps),
            MLP(config, mlp_spec(), ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.vision_group()),
        )

    def forward(self, x: Tensor, context: Tensor, lengths: Sequence[int]) -> Tensor:
        normed = self.query_norm(x)
        views = self.context_norm(context).split(list(lengths))
        seen = torch.cat([part for pair in zip(views, normed, strict=True) for part in pair])
        x = x + self.cross_attention(normed, seen, [n + x.shape[1] for n in lengths])
        return x + through(self.mlp, self.mlp_norm(x))


def through(mlp: MLP, x: Tensor) -> Tensor:
    """megatron's MLP gives its bias apart."""
    out, bias = mlp(x)
    return out if bias is None else out + bias
