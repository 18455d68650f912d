"""config.json and our ModelConfig, both ways, whatever the family.

What our model does not do is refused by field and value: a silent difference would be another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights.alone import ALONE, Alone
from vlm_nemo.weights.configs.common import Words, differing, special_ids
from vlm_nemo.weights.configs.forms import misfits, refuse
from vlm_nemo.weights.configs.internvl import read_remote
from vlm_nemo.weights.configs.languages import fitting_language, read_language, write_language
from vlm_nemo.weights.configs.towers import VARIANTS, fitting_tower, read_tower, write_tower
from vlm_nemo.weights.families import FAMILIES, Family
from vlm_nemo.weights.preprocessing import read_preprocessing

if TYPE_CHECKING:
    from vlm_nemo.weights.hf_folder import HFFolder

NEUTRAL_MEGATRON = ("recompute_", "cpu_offloading", "tp_comm_", "deterministic_mode")
"""Beginnings of megatron fields that change how the same numbers come about, not which model it is."""
FEATURE_LAYERS = {"clip": -2, "siglip": -2}
"""The hidden state that a tower which stands alone gives where nobody says another; -1 of the others."""


def model_config_of(*folders: HFFolder, feature_layer: int | None = None) -> ModelConfig:
    """Our configuration of what the folders hold together; a part that none of them gives has our defaults.

    feature_layer: the hidden state to take from a vision tower that stands alone; a whole model says it itself.
    Raises UserError naming a field and its value where we do not do what it asks for.
    """
    cfg = ModelConfig()
    for folder in folders:
        config, where = folder.config, str(folder.path / "config.json")
        if config.get("quantization_config"):
            raise refuse(where, "quantization_config", config["quantization_config"], "it does whole weights")
        if folder.family is not None:
            read = read_remote if folder.remote else FAMILIES[folder.family].read
            cfg = read(folder.family, config, where)
        else:
            _read_alone(cfg, ALONE[folder.architecture], config, where, feature_layer)
        if "vision" in folder.parts:
            read_preprocessing(folder.path, cfg)
        if "language" in folder.parts:
            cfg.language.tied_embeddings = folder.tied()
    if not any(folder.family for folder in folders):
        cfg.family = "" if whole_complaints(cfg) else cfg.family
    return cfg


def _read_alone(
    cfg: ModelConfig, alone: Alone, config: Mapping[str, Any], where: str, feature_layer: int | None
) -> None:
    if alone.part == "language":
        cfg.language = read_language(alone.kind, config, where)
        return
    given = config.get(alone.section or "", config)
    cfg.vision = read_tower(alone.kind, given, where)
    cfg.vision.feature_layer = FEATURE_LAYERS.get(alone.kind, -1) if feature_layer is None else feature_layer
    cfg.layout.aspect = "crop" if alone.kind == "clip" else "squash"


Complaint = tuple[str, Any, Any]
"""(key of ours, its value, what the class has)"""


def complaints(cfg: ModelConfig, parts: Sequence[str]) -> list[Complaint]:
    """Where a model is not what its family's class can express, by key."""
    if cfg.family not in FAMILIES:
        return [("family", cfg.family, f"one of {', '.join(FAMILIES)}")]
    family, found = FAMILIES[cfg.family], []
    if "vision" in parts:
        found += _vision_complaints(cfg, family)
    if "projector" in parts:
        found += [
            (f"{name}.{key}", value, wanted)
            for name, section, always, free in (
                ("projector", cfg.projector, family.projection, family.projection_free),
                ("reduce", cfg.reduce, family.reduce, {"factor"} if "kind" in family.reduce else {"factor", "kind"}),
            )
            for key, value, wanted in differing(section, always, frozenset(free))
        ]
        found += [
            (f"layout.{key}", getattr(cfg.layout, key), wanted)
            for key, wanted in family.layout.items()
            if getattr(cfg.layout, key) != wanted
        ]
    if "language" in parts:
        _, differs = fitting_language(cfg.language, family.languages)
        found += [(f"language.{key}", value, wanted) for key, value, wanted in differs]
        usual = {"image_attention": "causal", **family.language}
        found += [
            (f"language.{key}", getattr(cfg.language, key), wanted)
            for key, wanted in usual.items()
            if getattr(cfg.language, key) != wanted
        ]
        found += _megatron_complaints(cfg)
    return found


def whole_complaints(cfg: ModelConfig) -> list[Complaint]:
    """The same of all parts."""
    return complaints(cfg, ("vision", "projector", "language"))


def _vision_complaints(cfg: ModelConfig, family: Family) -> list[Complaint]:
    if family.tower_variant:
        differs = misfits(VARIANTS[family.tower_variant], cfg.vision)
    else:
        differs = fitting_tower(cfg.vision, family.towers)[1]
    found = [(f"vision.{key}", value, wanted) for key, value, wanted in differs]
    return found + [
        (f"vision.{key}", getattr(cfg.vision, key), wanted)
        for key, wanted in family.vision.items()
        if getattr(cfg.vision, key) != wanted
    ]


def _megatron_complaints(cfg: ModelConfig) -> list[Complaint]:
    return [
        (f"megatron.{name}", value, "no such field")
        for name, value in cfg.megatron.items()
        if not name.startswith(NEUTRAL_MEGATRON)
    ]


def check_exportable(cfg: ModelConfig, parts: Sequence[str]) -> None:
    """Raises UserError naming the keys of a model that its family's class cannot express.

    parts: all of them, or vision or language alone: then any class of such a part will do.
    """
    if len(parts) == 1:
        found, what = part_misfits(cfg, parts[0])
    else:
        found = complaints(cfg, parts)
        what = FAMILIES[cfg.family].architecture if cfg.family in FAMILIES else "family"
    if found:
        keys = "; ".join(f"model.{key}={_yaml(value)} (it has {_yaml(wanted)})" for key, value, wanted in found)
        alone = "" if len(parts) == 1 else "; part=vision and part=language may write its parts"
        raise UserError(f"Hugging Face's {what} has no such model: {keys}{alone}")


def _yaml(value: Any) -> str:
    """As a recipe spells it."""
    return {True: "true", False: "false", None: "null"}[value] if value in (True, False, None) else str(value)


def part_misfits(cfg: ModelConfig, part: str) -> tuple[list[Complaint], str]:
    """(where a part is not what the nearest class of such a part can express, that class)."""
    kinds = list(dict.fromkeys(alone.kind for alone in ALONE.values() if alone.part == part))
    if part == "vision":
        kind, differs = fitting_tower(cfg.vision, kinds)
        more = []
    else:
        kind, differs = fitting_language(cfg.language, kinds)
        more = _megatron_complaints(cfg)
    architecture = next(name for name, alone in ALONE.items() if alone.kind == kind)
    return [(f"{part}.{key}", value, wanted) for key, value, wanted in differs] + more, architecture


def hf_config_of(
    cfg: ModelConfig, words: Words | None, *, dtype: str = "float32", part: str | None = None
) -> dict[str, Any]:
    """config.json of a model, in the hub's spelling (transformers 4), which transformers 5 reads as well.

    dtype: the type of the weights, as torch spells it. part: vision or language, for a tower or a decoder alone.
    words: says the special ids; None only for a vision tower.
    """
    if part is not None:
        _, architecture = part_misfits(cfg, part)
        kind = ALONE[architecture].kind
        named = {"architectures": [architecture]}
        if part == "vision":
            head = {"siglip": {"vision_use_head": False}, "aimv2": {"use_head": False}}.get(kind, {})
            return {**named, **write_tower(kind, cfg.vision), **head, "torch_dtype": dtype}
        assert words is not None
        return {**named, **write_language(kind, cfg.language), **special_ids(words), "torch_dtype": dtype}
    assert words is not None
    family = FAMILIES[cfg.family]
    content = family.write(cfg.family, cfg, words)
    if "text_config" in content:
        content["text_config"] = {**content["text_config"], **special_ids(words), "torch_dtype": dtype}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **content,
        "torch_dtype": dtype,
    }
