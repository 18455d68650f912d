"""The projector that a config asks for."""

from __future__ import annotations

import torch

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.projector.base import Projector
from vlm_nemo.model.projector.mlp import MLPProjector
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


def build_projector(cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> Projector:
    """Raises UserError where reduction, tower and projector do not fit together."""
    if cfg.vision.class_token and cfg.vision.keep_class_token and cfg.reduce.kind != "none":
        raise UserError(
            f"model.reduce.kind={cfg.reduce.kind} takes patches on a grid, where a class token has no place; "
            "set model.vision.keep_class_token=false"
        )
    return MLPProjector(cfg, parallel, dtype)
