"""The shape of every global tensor of ours, from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlm_nemo.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from vlm_nemo.model.tiles import tilings
from vlm_nemo.weights.names.rows import Entry

Shape = tuple[int, ...]


def expected_shapes(entry: Entry, cfg: ModelConfig) -> list[Shape]:
    """Of the tensors of a folder that an entry is made of."""
    ours = torch.empty(our_shape(entry.ours, cfg), device="meta")
    return [tuple(tensor.shape) for tensor in entry.transform.split(ours, entry.sizes)]


def our_shape(key: str, cfg: ModelConfig) -> Shape:
    """Of a global tensor of ours: "language.output_layer.weight" -> (vocab_size, hidden_size)."""
    part, _, rest = key.partition(".")
    if part == "vision":
        return _found(rest, _vision(cfg.vision))
    if part == "language":
        return _found(rest, _language(cfg.language))
    return _found(rest, _projector(cfg.projector, cfg))


def _found(name: str, shapes: Mapping[str, Shape]) -> Shape:
    """By the longest end of the name that there is a shape of, a layer's number left out."""
    words = [word for word in name.split(".") if not word.isdigit()]
    for start in range(len(words)):
        end = ".".join(words[start:])
        if end in shapes:
            return shapes[end]
        # A bias has a number for each row of its weight
        if words[-1] == "bias" and (weight := ".".join([*words[start:-1], "weight"])) in shapes:
            return shapes[weight][:1]
    raise KeyError(name)


def _vision(v: VisionConfig) -> dict[str, Shape]:
    width, side = v.hidden_size, v.image_size // v.patch_size
    pixels = 3 * v.patch_size**2
    frames = () if v.temporal_patch_size == 1 else (v.temporal_patch_size,)
    return {
        "patch_weight": (width, *frames, pixels),
        "patch_bias": (width,),
        "position": (side**2 + int(v.class_token), width),
        "class_token": (width,),
        "self_attention.linear_qkv.weight": (3 * width, width),
        "self_attention.linear_proj.weight": (width, width),
        "mlp.linear_fc1.weight": (v.ffn_hidden_size * (2 if v.gated else 1), width),
        "mlp.linear_fc2.weight": (width, v.ffn_hidden_size),
        "attention_scale": (width,),
        "mlp_scale": (width,),
        "attention_gate": (1,),
        "mlp_gate": (1,),
        **_tiling(v, side**2 + 1),
        "weight": (width,),  # of every norm
    }


def _tiling(v: VisionConfig, places: int) -> dict[str, Shape]:
    if v.tiles is None:
        return {}
    kinds = 1 + len(tilings(v.tiles))
    tables = {"before": 1, "position": places, "behind": 1}
    found: dict[str, Shape] = {}
    for name, count in tables.items():
        found |= {f"tiling.{name}": (kinds, v.tiles * count * v.hidden_size), f"tiling.{name}_gate": (1,)}
    return found


def _language(c: LanguageConfig) -> dict[str, Shape]:
    head = c.head_dim or c.hidden_size // c.num_heads
    return {
        "word_embeddings.weight": (c.vocab_size + c.input_tokens, c.hidden_size),
        "output_layer.weight": (c.vocab_size, c.hidden_size),
        "self_attention.linear_qkv.weight": ((c.num_heads + 2 * c.num_kv_heads) * head, c.hidden_size),
        "self_attention.linear_proj.weight": (c.hidden_size, c.num_heads * head),
        "cross_attention.linear_q.weight": (c.num_heads * head, c.hidden_size),
        "cross_attention.linear_kv.weight": (2 * c.num_kv_heads * head, c.hidden_size),
        "cross_attention.linear_proj.weight": (c.hidden_size, c.num_heads * head),
        "attention_gate": (1,),
        "mlp_gate": (1,),
        "q_layernorm.weight": (head,),
        "k_layernorm.weight": (head,),
        "mlp.linear_fc1.weight": (2 * c.ffn_hidden_size, c.hidden_size),
        "mlp.linear_fc2.weight": (c.hidden_size, c.ffn_hidden_size),
        **_experts(c),
        "weight": (c.hidden_size,),  # of every norm
    }


def _experts(c: LanguageConfig) -> dict[str, Shape]:
    moe = c.moe
    if moe.experts is None:
        return {}
    inside, shared = moe.ffn_hidden_size or c.ffn_hidden_size, moe.shared_ffn_hidden_size or 0
    return {
        "mlp.router.weight": (moe.experts, c.hidden_size),
        "mlp.experts.linear_fc1.weight": (2 * inside, c.hidden_size),
        "mlp.experts.linear_fc2.weight": (c.hidden_size, inside),
        "mlp.shared_experts.gate_weight": (1, c.hidden_size),
        "mlp.shared_experts.linear_fc1.weight": (2 * shared, c.hidden_size),
        "mlp.shared_experts.linear_fc2.weight": (c.hidden_size, shared),
    }


def _projector(p: ProjectorConfig, cfg: ModelConfig) -> dict[str, Shape]:
    out = cfg.language.hidden_size
    patch = cfg.vision.feature_size
    wide = patch * (cfg.reduce.factor**2 if cfg.reduce.kind in ("pixel_shuffle", "merge", "hidden_stride") else 1)
    inner = p.hidden_size or out
    if p.kind == "visual_vocabulary":
        words = p.vocabulary - p.indicators
        return {"head.weight": (words, wide), "norm.weight": (words,), "table.weight": (p.vocabulary, out)}
    if p.kind == "qformer":
        ffn = p.ffn_hidden_size or 4 * inner
        return {
            "queries": (p.num_queries, inner),
            "self_attention.linear_qkv.weight": (3 * inner, inner),
            "linear_q.weight": (inner, inner),
            "linear_kv.weight": (2 * inner, patch),
            "linear_proj.weight": (inner, inner),
            "mlp.linear_fc1.weight": (ffn, inner),
            "mlp.linear_fc2.weight": (inner, ffn),
            "output.weight": (out, inner),
            "weight": (inner,),  # of every norm
        }
    return {
        "newline": (out,),
        "norm.weight": (patch if p.norm_place == "patch" else wide,),
        "layers.linear_fc1.weight": (inner, wide),
        "layers.linear_fc2.weight": (out, inner),
        "layers.weight": (out, wide),
    }
