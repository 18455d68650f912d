"""What a checkpoint says of its model: sizes, template, precision; whether they fit the tokenizer.

Plain data: nothing in it is ever instantiated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError


def checkpoint_config(step_folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with. Raises UserError where it is not plain data of a run."""
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
    built.kernels, built.fp8 = "auto", "none"  # how it was computed: it is the same model without
    return built


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError where the tokenizer has ids that the embedding has no row for."""
    language = model.language
    if tokenizer.vocab_size > language.vocab_size + language.input_tokens:
        more = f" and model.language.input_tokens={language.input_tokens}" if language.input_tokens else ""
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.language.vocab_size is "
            f"{language.vocab_size}{more}; raise it to a multiple of 64 of at least {tokenizer.vocab_size}"
        )
    if tokenizer.eos_id >= language.vocab_size:
        raise UserError(
            f"the tokenizer's eos is {tokenizer.eos_id}, which the head cannot say: model.language.vocab_size="
            f"{language.vocab_size}, and the model.language.input_tokens={language.input_tokens} behind are only read"
        )


def check_tokenizer(tokenizer: Tokenizer, step_folder: Path, remedy: str) -> None:
    """Raises UserError where a checkpoint was trained with another tokenizer; remedy: what may be done else."""
    if not tokenizer.same_as(step_folder / "tokenizer"):
        raise UserError(
            f"data.tokenizer={tokenizer.folder} is not the tokenizer that {step_folder} was trained with: its ids "
            f"mean other words; use {step_folder}/tokenizer, or {remedy}"
        )
