"""Do the numbers of a model go together, whatever its layout? No torch, as in layout.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from vlm_nemo.model.config import LanguageConfig, ModelConfig


def check_architecture(model: ModelConfig) -> None:
    """Raise UserError, one line that says what to change, where they do not."""
    _check_heads(model)
    _check_positions(model.language)
    _check_experts(model.language)


def _check_heads(model: ModelConfig) -> None:
    """Widths must split into heads, and query heads into groups that share a key and a value."""
    language, vision = model.language, model.vision
    cut = [
        ("model.language.num_heads", language.num_heads, "num_kv_heads", language.num_kv_heads),
        ("model.vision.hidden_size", vision.hidden_size, "num_heads", vision.num_heads),
    ]
    if language.head_dim is None:
        cut.insert(0, ("model.language.hidden_size", language.hidden_size, "num_heads", language.num_heads))
    for of, whole, name, size in cut:
        if size < 1 or whole % size:
            key = f"{of.rsplit('.', 1)[0]}.{name}"
            raise UserError(f"{key}={size} does not divide {of}={whole}; change either number")
    if language.input_tokens and language.tied_embeddings:
        raise UserError(
            f"model.language.input_tokens={language.input_tokens} are rows that the head has not, so that it cannot "
            "share them: set model.language.tied_embeddings=false or input_tokens=0"
        )
    if head_dim(language) < 2 or head_dim(language) % 2:
        raise UserError(
            f"a head of the language model is {head_dim(language)} wide and rotary positions turn pairs; make "
            "model.language.head_dim even"
        )


def head_dim(language: LanguageConfig) -> int:
    """Width of one head of the decoder."""
    return language.head_dim or language.hidden_size // language.num_heads


def _check_positions(language: LanguageConfig) -> None:
    """Rotary sections, windows and stretching must be of numbers that mean something together."""
    sections, half = language.mrope_section, head_dim(language) // 2
    if sections and (len(sections) != 3 or min(sections) < 0 or sum(sections) != half):
        raise UserError(
            f"model.language.mrope_section={sections} must be three numbers that sum to {half}, half of a head of "
            f"{head_dim(language)}"
        )
    for name, value in (("window", language.window), ("global_every", language.global_every)):
        if value is not None and value < 1:
            raise UserError(f"model.language.{name}={value}: the smallest is 1; null turns it off")
    for name, given in (("global_every", language.global_every), ("rope_local_base", language.rope_local_base)):
        if given is not None and language.window is None:
            raise UserError(f"model.language.{name}={given} is of layers with a window; set model.language.window")
    scaling = language.rope_scaling
    if scaling.factor < 1:
        raise UserError(f"model.language.rope_scaling.factor={scaling.factor}: the smallest is 1")
    if scaling.kind == "llama3" and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"model.language.rope_scaling.low_freq_factor={scaling.low_freq_factor} must lie between 0 and "
            f"high_freq_factor={scaling.high_freq_factor}"
        )


def _check_experts(language: LanguageConfig) -> None:
    """Experts must be enough for what a token goes to."""
    moe = language.moe
    if moe.experts is None:
        return
    if not 1 <= moe.top_k <= moe.experts:
        raise UserError(
            f"model.language.moe.top_k={moe.top_k} is not between 1 and model.language.moe.experts={moe.experts}"
        )
    if moe.top_k == 1 and moe.norm_top_k:
        raise UserError(
            "model.language.moe.norm_top_k=true gives the one expert of model.language.moe.top_k=1 the weight 1, so "
            "that the router never learns; set norm_top_k to false"
        )
    if moe.every < 1:
        raise UserError(f"model.language.moe.every={moe.every}: the smallest is 1")
    if language.cross_attention_layers:
        raise UserError(
            f"model.language.cross_attention_layers={list(language.cross_attention_layers)} and "
            f"model.language.moe.experts={moe.experts} do not go together; empty the one or set the other to null"
        )
