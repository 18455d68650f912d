"""What a model is made of. No torch here, so that a recipe composes (and a typo fails) in half a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class VisionConfig:
    """A CLIP-style vision transformer (`vlm_nemo.model.vision`)."""

    image_size: int = 336
    """Side of the square input, pixels."""
    patch_size: int = 14
    """Side of one patch, pixels; divides image_size."""
    hidden_size: int = 1024
    """Width of the vision transformer."""
    num_layers: int = 24
    """Layers of the vision transformer."""
    num_heads: int = 16
    """Attention heads; divisible by parallel.tensor."""
    ffn_hidden_size: int = 4096
    """Width inside the MLP; divisible by parallel.tensor."""
    activation: str = field(default="quick_gelu", metadata={"choices": ("quick_gelu", "gelu")})
    """Inside the MLP; CLIP's own is quick_gelu."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    class_token: bool = True
    """Prepend a learned class token, as CLIP does."""
    keep_class_token: bool = False
    """Hand the class token to the projector too (one more placeholder an image)."""
    position_init_std: float | None = None
    """Spread of fresh position embeddings; null = model.init_std. In a tower trained from nothing those are lost beside
    what the patches give; about as large, they made the demo's loss a few per cent lower at equal steps."""
    pre_norm: bool = True
    """LayerNorm before the first layer (CLIP's pre_layrnorm)."""
    feature_layer: int = -2
    """Which hidden state the projector sees, counted as Hugging Face counts: -1 last layer, -2 the one before."""
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Red, green, blue mean that is subtracted; pixels count from 0 to 1."""
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Red, green, blue deviation that is divided by."""
    aspect: str = field(default="pad", metadata={"choices": ("pad", "crop", "squash")})
    """How an image becomes square: pad (LLaVA-1.5's training), crop (CLIP's centre crop), squash."""


@dataclass(kw_only=True)
class ProjectorConfig:
    """From vision features to language embeddings (`vlm_nemo.model.projector`)."""

    num_layers: int = 2
    """1 = linear (LLaVA), 2 = linear-GELU-linear (LLaVA-1.5)."""
    activation: str = field(default="gelu", metadata={"choices": ("gelu", "quick_gelu")})
    """Between the layers."""


@dataclass(kw_only=True)
class LanguageConfig:
    """A Llama-style decoder (`vlm_nemo.model.language`): RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    vocab_size: int = 32064
    """Rows of the embedding; at least the tokenizer's size, divisible by parallel.tensor."""
    hidden_size: int = 4096
    """Width of the decoder."""
    num_layers: int = 32
    """Layers of the decoder; divisible by parallel.pipeline x parallel.virtual."""
    num_heads: int = 32
    """Query heads; divisible by parallel.tensor."""
    num_kv_heads: int = 32
    """Key and value heads (grouped-query attention); divisible by parallel.tensor."""
    ffn_hidden_size: int = 11008
    """Width inside the SwiGLU MLP; divisible by parallel.tensor."""
    rope_base: float = 10000.0
    """Base of the rotary positions."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    tied_embeddings: bool = False
    """Share the embedding's weights with the output layer."""
    max_positions: int = 4096
    """Longest sample, tokens (image tokens included)."""


@dataclass(kw_only=True)
class ModelConfig:
    """Vision tower, projector and language model (`vlm_nemo.model.vlm`)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    init_std: float = 0.02
    """Standard deviation of fresh weight matrices."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any other field of megatron-core's TransformerConfig, checked by name, for the language model."""
