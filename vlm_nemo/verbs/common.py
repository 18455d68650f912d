"""What several verbs do the same way: logging, the tokenizer, the image layout, a model from a checkpoint."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_nemo.data.chat import TEMPLATES, Template
from vlm_nemo.data.layout import ImageSpec, image_spec
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Engine
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig, VisionConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.layout import check_layout
from vlm_nemo.train import checkpoint
from vlm_nemo.types import UserError


def set_up_logging(rank: int) -> None:
    """Warnings and errors to stderr, with the rank where there are several."""
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{prefix}%(levelname)s: %(message)s")


def spec_of(vision: VisionConfig) -> ImageSpec:
    """What the tower expects, in the data engine's words."""
    kept = vision.class_token and vision.keep_class_token
    return image_spec(vision.image_size, vision.patch_size, kept, vision.aspect, tuple(vision.mean))


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError where the tokenizer has ids that the embedding has no row for."""
    if tokenizer.vocab_size > model.language.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.language.vocab_size is "
            f"{model.language.vocab_size}; raise it to a multiple of 128 of at least {tokenizer.vocab_size}"
        )


class Loaded:
    """A model from a checkpoint, with all that it was trained with."""

    def __init__(self, step_folder: Path, parallel: ParallelConfig, precision: str, ranks: Ranks) -> None:
        """Must run inside `device.adapter()`. Raises UserError for a damaged checkpoint or an unfit layout."""
        checkpoint.check(step_folder, ranks, ("weights/", "tokenizer/", "config.yaml"))
        saved = checkpoint_config(step_folder)
        self.path = step_folder
        self.cfg: ModelConfig = model_config(saved)
        check_layout(parallel, self.cfg, world_size=ranks.world)
        self.tokenizer = Tokenizer(step_folder / "tokenizer")
        self.template: Template = TEMPLATES[saved["data"]["template"]]
        self.spec = spec_of(self.cfg.vision)
        chunks = build_model(self.cfg, parallel, saved["precision"] if precision == "auto" else precision, 0, fresh=())
        checkpoint.load_weights(step_folder, chunks)
        self.engine = Engine(
            chunk=chunks[0],
            cfg=self.cfg,
            ranks=ranks,
            image_token=self.tokenizer.image_id,
            pad_token=self.tokenizer.pad_id,
            eos_token=self.tokenizer.eos_id,
            vocab_size=self.tokenizer.vocab_size,
        )


def checkpoint_config(step_folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with, as plain data: nothing in it is ever instantiated."""
    import yaml

    content = yaml.safe_load((step_folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"model", "data"} <= set(content):
        raise UserError(f"{step_folder / 'config.yaml'} is not the configuration of a run")
    if "${" in str(content):
        raise UserError(
            f"{step_folder / 'config.yaml'} holds an interpolation; a checkpoint's configuration is plain data"
        )
    return content


def model_config(saved: dict[str, Any]) -> ModelConfig:
    """The model's part of a checkpoint's configuration, checked against today's keys. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), saved["model"])
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"the checkpoint's model configuration does not fit this version: {error}") from None
    assert isinstance(built, ModelConfig)
    return built


def inference_layout(parallel: ParallelConfig) -> ParallelConfig:
    """Without the interleaved schedule, which needs several rows at a time; any checkpoint loads at any layout."""
    return replace(parallel, virtual=1, recompute="none", distributed_optimizer=False)
