"""conf/model's files as configurations, and transformers' classes of them without weights."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.weights.experts import unjoined
from vlm_nemo.config import Config, build, compose
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.parts import group_choices
from vlm_nemo.weights.config import hf_config_of
from vlm_nemo.weights.configs.common import Words
from vlm_nemo.weights.families import FAMILIES

NAMES = [name for name in group_choices("model") if name != "tiny"]
"""Every model that is published somewhere."""


class FakeWords:
    """Special ids without a tokenizer."""

    bos_id: int | None = 1
    eos_id = 2
    pad_id = 0
    image_id = 3

    def special(self, name: str) -> int:
        return 4 + sum(name.encode()) % 50


def published(name: str) -> ModelConfig:
    return deepcopy(_published(name))


@lru_cache
def _published(name: str) -> ModelConfig:
    return build(compose("train", Config, [f"model={name}"]), Config).model


def hf_config(content: dict[str, Any]) -> transformers.PretrainedConfig:
    """config.json as transformers reads it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        return transformers.AutoConfig.from_pretrained(folder)


def hf_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its state_dict as the hub spells experts."""
    text = getattr(model.config, "text_config", model.config)
    return unjoined(model.state_dict(), text.model_type == "mixtral")


def hf_model(cfg: ModelConfig, device: str = "cpu", words: Words | None = None) -> nn.Module:
    """transformers' class of a model, its own initial weights (or none, device="meta")."""
    config = hf_config(hf_config_of(cfg, words or FakeWords()))
    with torch.device(device):
        return getattr(transformers, FAMILIES[cfg.family].architecture)(config)
