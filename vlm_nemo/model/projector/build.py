"""The projector that a config asks for."""

from __future__ import annotations

import torch

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.projector.base import Projector
from vlm_nemo.model.projector.mlp import MLPProjector
from vlm_nemo.model.projector.queries import Perceiver, QFormer
from vlm_nemo.model.projector.vocabulary import VisualVocabulary
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


def build_projector(cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> Projector:
    """Raises UserError where reduction, tower and projector do not fit together."""
    own = cfg.projector
    if cfg.vision.class_token and cfg.vision.keep_class_token and cfg.reduce.kind != "none":
        raise UserError(
            f"model.reduce.kind={cfg.reduce.kind} takes patches on a grid, where a class token has no place; "
            "set model.vision.keep_class_token=false"
        )
    if own.kind == "mlp":
        return MLPProjector(cfg, parallel, dtype, own.num_layers)
    if own.newline:
        raise UserError(f"model.projector.newline is of model.projector.kind=mlp, not of {own.kind}")
    if own.kind == "cross_attention":  # one map to the decoder's width; its own layers do the rest
        return MLPProjector(cfg, parallel, dtype, 1)
    if own.norm != "none":
        raise UserError(
            f"model.projector.norm={own.norm} is of model.projector.kind=mlp; {own.kind} has norms of its own"
        )
    if own.kind == "qformer":
        return QFormer(cfg, parallel, dtype)
    if own.kind == "perceiver":
        return Perceiver(cfg, parallel, dtype)
    return VisualVocabulary(cfg, parallel, dtype)
