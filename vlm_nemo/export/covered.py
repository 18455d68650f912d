"""Which models the two graphs can say: LLaVA's shape. Everything else is refused by the key that makes it so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError

COVERED: dict[str, tuple[Any, ...]] = {
    "layout.kind": ("square",),
    "vision.patch_bias": (False,),
    "vision.temporal_patch_size": (1,),
    "vision.activation": ("quick_gelu", "gelu"),
    "vision.gated": (False,),
    "vision.norm": ("layernorm",),
    "vision.qkv_bias": (True,),
    "vision.bias": (True,),
    "vision.output_bias": (True,),
    "vision.qk_norm": (False,),
    "vision.layer_scale": (None,),
    "vision.position": ("learned",),
    "vision.patch_norm": (False,),
    "vision.post_norm": (False,),
    "vision.window": (None,),
    "vision.tiles": (None,),
    "vision.kept_layers": ([],),
    "reduce.kind": ("none",),
    "projector.kind": ("mlp",),
    "projector.num_layers": (1, 2),
    "projector.activation": ("quick_gelu", "gelu"),
    "projector.bias": (True,),
    "projector.norm": ("none",),
    "projector.newline": (False,),
    "language.input_tokens": (0,),
    "language.activation": ("silu",),
    "language.qkv_bias": (False,),
    "language.qk_norm": (False,),
    "language.norm_plus_one": (False,),
    "language.sandwich_norm": (False,),
    "language.window": (None,),
    "language.attention_scale": (None,),
    "language.image_attention": ("causal",),
    "language.rope_local_base": (None,),
    "language.rope_scaling.kind": ("none",),
    "language.mrope_section": ([],),
    "language.embedding_scale": (1.0,),
    "language.cross_attention_layers": ([],),
}
"""Key under `model` -> the values that the graphs are written for."""


def check_covered(cfg: ModelConfig) -> None:
    """Raises UserError that names every key whose value the graphs do not have."""
    if uncovered := list(_uncovered(cfg)):
        raise UserError(
            f"export writes graphs of LLaVA's shape, and not yet of {', '.join(uncovered)}; `vlm-nemo convert "
            "checkpoint=DIR out=DIR` writes this model for other runtimes"
        )


def _uncovered(cfg: ModelConfig) -> Iterator[str]:
    for key, values in COVERED.items():
        value: Any = cfg
        for word in key.split("."):
            value = getattr(value, word)
        if value not in values:
            yield f"model.{key}={value}"
    lang = cfg.language
    if cfg.projector.hidden_size not in (None, lang.hidden_size):
        yield f"model.projector.hidden_size={cfg.projector.hidden_size}"
    if lang.head_dim not in (None, lang.hidden_size // lang.num_heads):
        yield f"model.language.head_dim={lang.head_dim}"
