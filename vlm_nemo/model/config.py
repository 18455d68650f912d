"""What a model is made of. No torch here, so that a recipe composes (and a typo fails) in half a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlm_nemo.data.config import LayoutConfig


@dataclass(kw_only=True)
class VisionConfig:
    """A vision transformer (`vlm_nemo.model.vision`): CLIP's by default; the switches make every other tower of it."""

    image_size: int = 336
    """Side of the square that the position embeddings are made for, and of every square view, pixels."""
    patch_size: int = 14
    """Side of one patch, pixels; what a view has over at its right and lower edge is not seen (384 = 27 x 14 + 6)."""
    patch_bias: bool = False
    """A bias on the patch projection (SigLIP, InternViT, AIMv2)."""
    temporal_patch_size: int = 1
    """Frames that a patch spans; a still image is repeated (Qwen2-VL: 2)."""
    hidden_size: int = 1024
    """Width of the vision transformer."""
    num_layers: int = 24
    """Layers of the vision transformer."""
    num_heads: int = 16
    """Attention heads; divisible by parallel.tensor."""
    ffn_hidden_size: int = 4096
    """Width inside the MLP; divisible by parallel.tensor."""
    activation: str = field(default="quick_gelu", metadata={"choices": ("quick_gelu", "gelu", "gelu_tanh", "silu")})
    """Inside the MLP; CLIP's own is quick_gelu."""
    gated: bool = False
    """Two matrices into the MLP, one through the activation, multiplied (SwiGLU with silu: AIMv2, Qwen2.5-VL)."""
    norm: str = field(default="layernorm", metadata={"choices": ("layernorm", "rmsnorm")})
    """Kind of every norm."""
    norm_eps: float = 1e-5
    """Added to the variance (or mean square) in every norm."""
    qkv_bias: bool = True
    """Biases on query, key and value."""
    bias: bool = True
    """Biases on the attention's output and in the MLP."""
    output_bias: bool = True
    """With bias: the attention's output has one too (not in Llama 3.2 Vision)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys over the whole width, all heads together (InternViT-6B)."""
    layer_scale: float | None = None
    """Start of a learned factor a channel on what each half layer adds (InternViT: 0.1); null = no factor."""
    class_token: bool = True
    """Prepend a learned class token, as CLIP does."""
    keep_class_token: bool = False
    """Hand the class token to the projector too (one more placeholder an image)."""
    position: str = field(default="learned", metadata={"choices": ("learned", "rope", "none")})
    """Learned embeddings of a square grid (interpolated to other grids), 2-D rotary (Qwen2-VL), or none."""
    rope_base: float = 10000.0
    """Base of the rotary positions, where position=rope."""
    position_init_std: float | None = None
    """Spread of fresh position embeddings; null = model.init_std. In a tower trained from nothing those are lost beside
    what the patches give; about as large, they made the demo's loss a few per cent lower at equal steps."""
    patch_norm: bool = False
    """A norm of the patches before positions are added (AIMv2)."""
    pre_norm: bool = True
    """A norm before the first layer, positions added (CLIP's pre_layrnorm)."""
    post_norm: bool = False
    """A norm after the last layer, part of hidden state -1 (SigLIP, AIMv2)."""
    window: int | None = None
    """Side of the windows that attention stays within, pixels (Qwen2.5-VL: 112); null = whole images."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, that see whole images although there are windows."""
    tiles: int | None = None
    """Every image is filled up to so many tiles, which see one another and have learned embeddings of their place
    (Llama 3.2 Vision: 4, with model.layout.kind=canvas); null = a view sees itself only."""
    global_layers: int = 0
    """With tiles: further layers behind post_norm, what each half adds times a learned gate (Llama 3.2 Vision: 8)."""
    kept_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, whose output is part of a feature beside the last one's (Llama 3.2 Vision)."""
    feature_layer: int = -2
    """Which hidden state the projector sees, counted as Hugging Face counts: -1 last layer, -2 the one before."""
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Red, green, blue mean that is subtracted; pixels count from 0 to 1."""
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Red, green, blue deviation that is divided by."""

    @property
    def feature_size(self) -> int:
        """Width of a feature, as the projector gets it."""
        return self.hidden_size * (1 + len(self.kept_layers))


@dataclass(kw_only=True)
class ReduceConfig:
    """Fewer vectors an image before the projector (`vlm_nemo.model.reduce`)."""

    kind: str = field(
        default="none", metadata={"choices": ("none", "pixel_shuffle", "merge", "hidden_stride", "average_pool")}
    )
    """none; pixel_shuffle and merge: factor x factor neighbours side by side in one wider vector; hidden_stride: the
    same, odd grids padded with zeros; average_pool: their mean."""
    factor: int = 2
    """Neighbours that become one, along each side."""


@dataclass(kw_only=True)
class ProjectorConfig:
    """From vision features to language embeddings (`vlm_nemo.model.projector`)."""

    kind: str = field(
        default="mlp", metadata={"choices": ("mlp", "qformer", "perceiver", "visual_vocabulary", "cross_attention")}
    )
    """mlp; qformer (BLIP-2) and perceiver: learned queries look at a view; visual_vocabulary: Ovis' probabilities over
    visual words times their table; cross_attention: the decoder looks at the features (language.cross_attention_layers)
    and no placeholder is replaced."""
    num_layers: int = 2
    """Of mlp: 1 = linear (LLaVA), 2 = linear-GELU-linear (LLaVA-1.5). Of qformer and perceiver: their layers."""
    activation: str = field(default="gelu", metadata={"choices": ("gelu", "gelu_tanh", "quick_gelu", "silu")})
    """Between the layers; of perceiver, in its gated MLP (Idefics2: silu)."""
    bias: bool = True
    """Biases on the linear layers."""
    hidden_size: int | None = None
    """Width between the layers of mlp, or of qformer and perceiver; null = the language model's."""
    norm: str = field(default="none", metadata={"choices": ("none", "layernorm", "rmsnorm", "gemma")})
    """Norm before the first layer; gemma = RMSNorm times 1 + weight."""
    norm_place: str = field(default="reduced", metadata={"choices": ("patch", "reduced")})
    """The norm sees single patches (Qwen2-VL) or what the reduction made of them (InternVL, Gemma 3)."""
    norm_eps: float = 1e-5
    """Added to the variance or mean square in that norm."""
    newline: bool = False
    """A learned vector at the end of every row of tiles (LLaVA-NeXT's image_newline)."""
    num_queries: int = 32
    """Learned queries of qformer and perceiver: as many embeddings a view, whatever its size."""
    num_heads: int = 12
    """Attention heads of qformer and perceiver; divisible by parallel.tensor."""
    num_kv_heads: int | None = None
    """Key and value heads of perceiver; null = as many as heads."""
    head_dim: int | None = None
    """Width of one head of perceiver; null = its width over heads."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP of qformer and perceiver; null = four times its width."""
    cross_attention_every: int = 2
    """Every how manieth layer of qformer looks at the image, the first one included (BLIP-2: 2)."""
    vocabulary: int = 65536
    """Visual words of visual_vocabulary, indicators included; divisible by parallel.tensor."""
    indicators: int = 5
    """The last words of that vocabulary: they mark an image's start, end, rows, and never get probability."""
    tokenize: str = field(default="softmax", metadata={"choices": ("softmax", "gumbel", "st_argmax")})
    """How scores become probabilities of visual words: softmax, gumbel noise in training, straight-through argmax."""
    temperature: float = 1.0
    """Of those probabilities."""


@dataclass(kw_only=True)
class RopeScaling:
    """Rotary positions stretched for longer texts (`vlm_nemo.model.rope`)."""

    kind: str = field(default="none", metadata={"choices": ("none", "linear", "llama3")})
    """none; linear: all frequencies divided by factor; llama3: only the slow ones, with a smooth passage."""
    factor: float = 1.0
    """How much longer."""
    low_freq_factor: float = 1.0
    """Of llama3: waves longer than original_positions / this are stretched whole."""
    high_freq_factor: float = 4.0
    """Of llama3: waves shorter than original_positions / this stay."""
    original_positions: int = 8192
    """Of llama3: positions before stretching."""


@dataclass(kw_only=True)
class MoeConfig:
    """Experts in place of a layer's MLP (`vlm_nemo.model.experts`): every token goes to top_k of them."""

    experts: int | None = None
    """Experts of a sparse layer; divisible by parallel.expert; null = the model is dense."""
    top_k: int = 2
    """Experts that a token goes to."""
    norm_top_k: bool = True
    """The chosen experts' weights sum to one: softmax over the chosen (Mixtral, Qwen3-MoE), or over all (Qwen2-MoE)."""
    ffn_hidden_size: int | None = None
    """Width inside an expert; null = language.ffn_hidden_size (Mixtral)."""
    shared_ffn_hidden_size: int | None = None
    """Width of one more expert, which every token goes to (Qwen2-MoE); null = there is none."""
    shared_gate: bool = False
    """What that one gives is multiplied by a learned gate between 0 and 1 (Qwen2-MoE)."""
    every: int = 1
    """Every how manieth layer is sparse: with 2 the second, the fourth, …; the others have an MLP."""
    dense_layers: list[int] = field(default_factory=list)
    """Further layers, counted from 0, that have an MLP."""
    aux_loss: float = 0.0
    """Weight of the loss that keeps experts evenly used, a sample and sparse layer at a time; 0 = none. transformers'
    router_aux_loss_coef counts each of the top_k: 0.02 there is 0.02 x top_k here."""
    z_loss: float = 0.0
    """Weight of the loss that keeps the router's scores small; 0 = none."""

    def sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.experts is not None and (layer + 1) % self.every == 0 and layer not in self.dense_layers


@dataclass(kw_only=True)
class LanguageConfig:
    """A decoder (`vlm_nemo.model.language`): Llama's by default; the switches make Mistral, Mixtral, Qwen, Gemma 3."""

    vocab_size: int = 32064
    """Rows of embedding and head; at least the tokenizer's size, divisible by parallel.tensor."""
    input_tokens: int = 0
    """Rows that the embedding has beyond the head's, of tokens that are never said (Llama 3.2 Vision: 8)."""
    hidden_size: int = 4096
    """Width of the decoder."""
    num_layers: int = 32
    """Layers of the decoder; at least parallel.pipeline x parallel.virtual."""
    num_heads: int = 32
    """Query heads; divisible by parallel.tensor."""
    num_kv_heads: int = 32
    """Key and value heads (grouped-query attention); a multiple or a divisor of parallel.tensor."""
    head_dim: int | None = None
    """Width of one head; null = hidden_size / num_heads."""
    ffn_hidden_size: int = 11008
    """Width inside the gated MLP; divisible by parallel.tensor."""
    activation: str = field(default="silu", metadata={"choices": ("silu", "gelu_tanh")})
    """Inside the gated MLP (Gemma: gelu_tanh)."""
    qkv_bias: bool = False
    """Biases on query, key and value (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys (Qwen3, Gemma 3)."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    sandwich_norm: bool = False
    """Norms after attention and MLP too, before what they give is added (Gemma 3)."""
    window: int | None = None
    """Tokens back that attention reaches in local layers (Mistral, Gemma 3); null = all."""
    global_every: int | None = None
    """Every how manieth layer is global although there is a window (Gemma 3: 6); null = none is."""
    attention_scale: float | None = None
    """Scores are multiplied by it; null = 1 / sqrt(head_dim)."""
    image_attention: str = field(default="causal", metadata={"choices": ("causal", "bidirectional")})
    """What an image's tokens see of one another: those before, or all of the same image (Gemma 3)."""
    rope_base: float = 10000.0
    """Base of the rotary positions; of global layers where local ones have their own."""
    rope_local_base: float | None = None
    """Base in local layers (Gemma 3: 10000); null = rope_base. Never scaled."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """How positions are stretched."""
    mrope_section: list[int] = field(default_factory=list)
    """M-RoPE: rotary frequencies that follow time, row and column (Qwen2-VL: [16, 24, 24]); empty = ordinary."""
    embedding_scale: float = 1.0
    """Token embeddings (not images') are multiplied by it (Gemma: sqrt(hidden_size))."""
    cross_attention_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, that look at the image instead of at the text (Llama 3.2 Vision)."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Experts in place of MLPs."""
    tied_embeddings: bool = False
    """Share the embedding's weights with the output layer."""
    max_positions: int = 4096
    """Longest sample, tokens (image tokens included)."""


@dataclass(kw_only=True)
class ModelConfig:
    """Vision tower, reduction, projector and language model (`vlm_nemo.model.vlm`)."""

    family: str = "llava"
    """What the whole is called and exported as: a name in `vlm_nemo.weights.families`; "" = a composition of your own,
    whose parts can be exported one by one."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    init_std: float = 0.02
    """Standard deviation of fresh weight matrices."""
    kernels: str = field(default="auto", metadata={"choices": ("auto", "plain", "te")})
    """Layers and norms of decoder and tower: plain = megatron-core's and torch's; te = TransformerEngine's; auto = te
    where it is installed and a GPU is there. Checkpoints are the same."""
    fp8: str = field(default="none", metadata={"choices": ("none", "hybrid", "e4m3")})
    """Matrix products of the decoder in FP8, with TransformerEngine's layers: hybrid = e4m3 forward, e5m2 backward."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any other field of megatron-core's TransformerConfig, checked by name, for the language model."""
