"""Fresh weights as a function of (seed, parameter name) alone: every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from vlm_nemo.model.boxes import Box, LocalParameter
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import layers_used


def initialise(parameters: Iterable[LocalParameter], cfg: ModelConfig, seed: int) -> None:
    """Norms to one (to zero where they multiply by 1 + weight), biases and gates to zero, LayerScale to its start,
    matrices to normal(0, init_std); those that write into the residual stream are scaled by 1/sqrt(2 layers), as GPT-2
    and Megatron do."""
    with torch.no_grad():
        for local in parameters:
            for box, view in local.pieces(local.parameter.data):
                view.copy_(initial_value(box, cfg, seed))


def initial_value(box: Box, cfg: ModelConfig, seed: int) -> torch.Tensor:
    """fp32 values of one box. The whole global tensor is drawn and cut, so that a box does not depend on its layout."""
    last, words = box.key.rsplit(".", 1)[-1], box.key.split(".")
    if last.endswith("bias"):
        return torch.zeros(box.shape)
    if "norm" in words[-2]:
        return torch.zeros(box.shape) if _plus_one(words, cfg) else torch.ones(box.shape)
    if last in ("attention_scale", "mlp_scale"):
        assert cfg.vision.layer_scale is not None, "LayerScale without its start"
        return torch.full(box.shape, cfg.vision.layer_scale)
    if last.endswith("_gate"):
        return torch.zeros(box.shape)
    std = cfg.init_std
    if box.key == "vision.position" and cfg.vision.position_init_std is not None:
        std = cfg.vision.position_init_std
    if len(words) > 1 and words[-2] in ("linear_proj", "linear_fc2") and words[0] != "projector":
        layers = layers_used(cfg.vision) if words[0] == "vision" else cfg.language.num_layers
        std /= math.sqrt(2 * layers)
    digest = hashlib.sha256(f"{seed}/{box.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.normal(0.0, std, box.global_shape, generator=generator)[box.slices]


def _plus_one(words: list[str], cfg: ModelConfig) -> bool:
    """Whether a norm multiplies by 1 + weight (Gemma)."""
    if words[0] == "language":
        return cfg.language.norm_plus_one
    return words[:2] == ["projector", "norm"] and cfg.projector.norm == "gemma"
