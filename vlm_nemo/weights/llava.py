"""The names of LLaVA-1.5 (CLIP tower, MLP, Llama), both ways, as a table.

"Hub names" are the keys of the files that LLaVA-1.5 is published with: `vision_tower.vision_model.…`,
`multi_modal_projector.…`, `language_model.…`. Other tools read these; transformers 5 writes others and reads both.
Every spelling is brought to hub names when a folder is read, and a tower or a decoder alone is a prefix less.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from vlm_nemo.model.config import ModelConfig, VisionConfig
from vlm_nemo.model.vision import layers_used
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.types import UserError
from vlm_nemo.weights.transforms import GATE_UP, IDENTITY, PATCH, QKV, Sizes, Transform

LAYER = "{layer}"

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
"""Ours: the two that have a row a token."""

HUB_HEAD = "language_model.lm_head.weight"
POST_NORM = "vision_tower.vision_model.post_layernorm"
"""CLIP's norm of the pooled class token, which LLaVA never asks for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: our global key and the hub names it is made of."""

    ours: str
    hub: tuple[str, ...]
    transform: Transform = IDENTITY


def _both(ours: str, *hub: str, transform: Transform = IDENTITY) -> tuple[Row, Row]:
    """The rows of a weight and its bias."""
    weight, bias = (
        Row(ours=f"{ours}.{end}", hub=tuple(f"{name}.{end}" for name in hub), transform=transform)
        for end in ("weight", "bias")
    )
    return weight, bias


_V, _VL = "vision_tower.vision_model", "vision_tower.vision_model.encoder.layers.{layer}"
_L, _LL = "language_model.model", "language_model.model.layers.{layer}"
_OV, _OL = "vision.blocks.layers.{layer}", "language.decoder.layers.{layer}"

TABLE: dict[str, tuple[Row, ...]] = {
    "vision": (
        Row(ours="vision.class_token", hub=(f"{_V}.embeddings.class_embedding",)),
        Row(ours="vision.patch_weight", hub=(f"{_V}.embeddings.patch_embedding.weight",), transform=PATCH),
        Row(ours="vision.position", hub=(f"{_V}.embeddings.position_embedding.weight",)),
        *_both("vision.pre_norm", f"{_V}.pre_layrnorm"),
        *_both(f"{_OV}.input_layernorm", f"{_VL}.layer_norm1"),
        *_both(
            f"{_OV}.self_attention.linear_qkv", *(f"{_VL}.self_attn.{x}_proj" for x in ("q", "k", "v")), transform=QKV
        ),
        *_both(f"{_OV}.self_attention.linear_proj", f"{_VL}.self_attn.out_proj"),
        *_both(f"{_OV}.pre_mlp_layernorm", f"{_VL}.layer_norm2"),
        *_both(f"{_OV}.mlp.linear_fc1", f"{_VL}.mlp.fc1"),
        *_both(f"{_OV}.mlp.linear_fc2", f"{_VL}.mlp.fc2"),
    ),
    "projector": (
        *_both("projector.layers.linear_fc1", "multi_modal_projector.linear_1"),
        *_both("projector.layers.linear_fc2", "multi_modal_projector.linear_2"),
    ),
    "language": (
        Row(ours=EMBEDDING, hub=(f"{_L}.embed_tokens.weight",)),
        Row(ours=f"{_OL}.input_layernorm.weight", hub=(f"{_LL}.input_layernorm.weight",)),
        Row(
            ours=f"{_OL}.self_attention.linear_qkv.weight",
            hub=tuple(f"{_LL}.self_attn.{x}_proj.weight" for x in ("q", "k", "v")),
            transform=QKV,
        ),
        Row(ours=f"{_OL}.self_attention.linear_proj.weight", hub=(f"{_LL}.self_attn.o_proj.weight",)),
        Row(ours=f"{_OL}.pre_mlp_layernorm.weight", hub=(f"{_LL}.post_attention_layernorm.weight",)),
        Row(
            ours=f"{_OL}.mlp.linear_fc1.weight",
            hub=(f"{_LL}.mlp.gate_proj.weight", f"{_LL}.mlp.up_proj.weight"),
            transform=GATE_UP,
        ),
        Row(ours=f"{_OL}.mlp.linear_fc2.weight", hub=(f"{_LL}.mlp.down_proj.weight",)),
        Row(ours="language.decoder.final_layernorm.weight", hub=(f"{_L}.norm.weight",)),
        Row(ours=HEAD, hub=(HUB_HEAD,)),  # not there where the embeddings are tied
    ),
}

UNUSED = (
    rf"{re.escape(POST_NORM)}\.(weight|bias)",
    rf"{re.escape(_V)}\.embeddings\.position_ids",
    rf"{re.escape(_L)}\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
"""What published files hold and no forward pass of LLaVA reads; kept beside the weights, and given back."""

SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "llava": (
        (r"model\.language_model\.", "language_model.model."),
        (r"model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
        (r"lm_head\.", "language_model.lm_head."),
        (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
    "clip": (
        (r"(?=vision_model\.)", "vision_tower."),
        # transformers 5 writes a CLIPVisionModel without any prefix
        (r"(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", "vision_tower.vision_model."),
    ),
    "llama": ((r"(?=model\.|lm_head\.)", "language_model."),),
}
"""For each family of folders: the beginnings of keys and what they are on the hub. All are tried, in order."""

LEFT_OUT = {"clip": r"(text_model|text_projection|visual_projection)\.|logit_scale$"}
"""What a folder holds beside the part that is taken from it."""


def hub_name(name: str, family: str) -> str | None:
    """A key of a folder -> its hub name; None for what belongs to no part of ours (CLIP's text tower)."""
    if family in LEFT_OUT and re.match(LEFT_OUT[family], name):
        return None
    for pattern, replacement in SPELLINGS[family]:
        name = re.sub(rf"^{pattern}", replacement, name)
    return name


def part_of(hub: str) -> str:
    """vision | projector | language, from a hub name. Raises UserError for a name that is of none of them."""
    parts = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
    part = parts.get(hub.split(".", 1)[0])
    if part is None:
        raise UserError(f"tensor {hub} belongs to no part of LLaVA-1.5 (vision_tower, projector, language_model)")
    return part


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table for one layer of one model."""

    part: str
    ours: str
    hub: tuple[str, ...]
    transform: Transform
    sizes: Sizes


def entries(cfg: ModelConfig, parts: Collection[str] = PARTS) -> Iterator[Entry]:
    """Every global tensor of a model: those that there are once, then layer by layer."""
    layers = {"vision": layers_used(cfg.vision), "language": cfg.language.num_layers}
    for part in (part for part in PARTS if part in parts):
        sizes = _sizes(cfg, part)
        rows = [row for row in TABLE[part] if not (row.ours == HEAD and cfg.language.tied_embeddings)]
        yield from (_entry(part, row, None, sizes) for row in rows if LAYER not in row.ours)
        for layer in range(layers.get(part, 0)):
            yield from (_entry(part, row, layer, sizes) for row in rows if LAYER in row.ours)


def _entry(part: str, row: Row, layer: int | None, sizes: Sizes) -> Entry:
    def named(pattern: str) -> str:
        return pattern if layer is None else pattern.replace(LAYER, str(layer))

    hub = tuple(named(name) for name in row.hub)
    return Entry(part=part, ours=named(row.ours), hub=hub, transform=row.transform, sizes=sizes)


def _sizes(cfg: ModelConfig, part: str) -> Sizes:
    if part == "vision":
        return Sizes(heads=cfg.vision.num_heads, kv_heads=cfg.vision.num_heads, patch=cfg.vision.patch_size)
    if part == "language":
        return Sizes(heads=cfg.language.num_heads, kv_heads=cfg.language.num_kv_heads)
    return Sizes()


def idle_layers(cfg: ModelConfig) -> set[str]:
    """Hub names of the vision layers behind the one whose output the projector takes."""
    v = cfg.vision
    rows = [name for row in TABLE["vision"] if LAYER in row.ours for name in row.hub]
    return {name.replace(LAYER, str(n)) for n in range(layers_used(v), v.num_layers) for name in rows}


def exported_vision(cfg: ModelConfig, kept: Collection[str]) -> VisionConfig:
    """The tower as it is written: with all its layers where the idle ones were kept, else with those that are used.

    kept: hub names of a checkpoint's unused tensors. The features are the same either way.
    """
    if idle_layers(cfg) <= set(kept):
        return cfg.vision
    return replace(cfg.vision, num_layers=layers_used(cfg.vision), feature_layer=-1)


def unused_names(names: Iterable[str], cfg: ModelConfig) -> list[str]:
    """The hub names among `names` that our model of `cfg` has no place for, and that may be kept aside.

    Raises UserError that names a tensor which is neither used nor known to be idle: the folder is of another model.
    """
    used = {name for entry in entries(cfg) for name in entry.hub}
    idle = idle_layers(cfg) | ({HUB_HEAD} if cfg.language.tied_embeddings else set())
    rest = [name for name in names if name not in used]
    strange = [name for name in rest if name not in idle and not any(re.fullmatch(p, name) for p in UNUSED)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(f"tensor {strange[0]}{more}: LLaVA-1.5 of this configuration has no such tensor")
    return rest
