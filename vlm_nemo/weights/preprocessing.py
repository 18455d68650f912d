"""How an image becomes pixels and placeholders, both ways: Hugging Face's processor files and our configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights.configs.common import view_tokens
from vlm_nemo.weights.families import FAMILIES

FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Ours -> PIL's number."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """An image processor's fields, and where they stand."""

    path: Path
    config: dict[str, Any]

    def refuse(self, field: str, only: str) -> UserError:
        value = self.config.get(field)
        return UserError(f"{self.path}: {field}={value!r} is not something this version does; {only}")

    def demand(self, field: str, wanted: Any, only: str) -> None:
        """A field that has this value, or is left out. Raises UserError."""
        if self.config.get(field, wanted) != wanted:
            raise self.refuse(field, only)


def read_preprocessing(folder: Path, cfg: ModelConfig) -> None:
    """Set mean, std and layout as the folder's image processor has them; without any such file they stay.

    Raises UserError naming a field and its value where the processor does something else with pixels than we do.
    """
    file = _image_processor(folder)
    if file is None:
        return
    config = file.config
    for field in ("do_resize", "do_rescale", "do_normalize"):
        file.demand(field, True, "it does true")
    if abs((config.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise file.refuse("rescale_factor", "it does 1/255")
    if config.get("resample") is not None:
        known = {number: name for name, number in FILTERS.items()}
        if config["resample"] not in known:
            raise file.refuse("resample", f"it does {', '.join(f'{n} ({name})' for n, name in known.items())}")
        cfg.layout.resample = known[config["resample"]]
    cfg.vision.mean = list(config.get("image_mean") or cfg.vision.mean)
    cfg.vision.std = list(config.get("image_std") or cfg.vision.std)
    readers = {
        "square": _read_square,
        "anyres": _read_anyres,
        "tiles": _read_tiles,
        "canvas": _read_canvas,
        "ovis": _read_ovis,
        "rows": _read_rows,
        "native": _read_native,
    }
    readers[cfg.layout.kind](file, cfg, cfg.layout)


def _read_square(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    size = cfg.vision.image_size
    if file.config.get("do_pan_and_scan"):
        raise file.refuse("do_pan_and_scan", "it does false")
    aspect = _aspect(file.config, size)
    if aspect is None:
        raise file.refuse("size", f"the vision tower takes squares of {size} pixels")
    layout.aspect = aspect


def _aspect(config: Mapping[str, Any], size: int) -> str | None:
    """pad | crop | squash; None where another size comes out."""
    target, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    kind = str(config.get("image_processor_type") or "CLIP")
    if config.get("do_pad", False):
        return "pad" if size in (target or (size,)) else None
    if config.get("do_center_crop", "CLIP" in kind or "Llava" in kind):
        # An edge that is resized to another length than is cut out would keep another part of the image
        return "crop" if target in (None, (size,)) and crop in (None, (size,), (size, size)) else None
    return "squash" if target == (size, size) else None


def _sides(value: Any) -> tuple[int, ...] | None:
    """336 or {"shortest_edge": 336} -> (336,); {"height": 336, "width": 336} -> (336, 336)."""
    if value is None or isinstance(value, int):
        return None if value is None else (value,)
    if "shortest_edge" in value:
        return (value["shortest_edge"],)
    return (value.get("height"), value.get("width"))


def _squares(file: _File, size: int) -> None:
    """That views are squares of the tower's size. Raises UserError."""
    if _sides(file.config.get("size")) not in (None, (size,), (size, size)):
        raise file.refuse("size", f"the vision tower takes squares of {size} pixels")


def _read_anyres(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    _squares(file, cfg.vision.image_size)
    pinpoints = file.config.get("image_grid_pinpoints")
    if pinpoints is not None and [list(pair) for pair in pinpoints] != layout.pinpoints:
        raise file.refuse("image_grid_pinpoints", f"config.json has {layout.pinpoints}; they must be equal")


def _read_tiles(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    _squares(file, cfg.vision.image_size)
    layout.min_tiles = file.config.get("min_patches", layout.min_tiles)
    layout.max_tiles = file.config.get("max_patches", layout.max_tiles)


def _read_canvas(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    _squares(file, cfg.vision.image_size)
    file.demand("do_pad", True, "it does true")
    file.demand("max_image_tiles", cfg.vision.tiles, f"config.json has {cfg.vision.tiles} tiles")


def _read_ovis(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    file.demand("use_covering_area_grid", True, "it does true")
    _read_tiles(file, cfg, layout)


def _read_rows(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    file.demand("do_image_splitting", True, "it does true")
    size = cfg.vision.image_size
    if (file.config.get("max_image_size") or {}).get("longest_edge", size) != size:
        raise file.refuse("max_image_size", f"the vision tower takes squares of {size} pixels")
    layout.longest_edge = (file.config.get("size") or {}).get("longest_edge", layout.longest_edge)


def _read_native(file: _File, cfg: ModelConfig, layout: LayoutConfig) -> None:
    for field, wanted in (
        ("patch_size", cfg.vision.patch_size),
        ("temporal_patch_size", cfg.vision.temporal_patch_size),
        ("merge_size", cfg.reduce.factor),
    ):
        file.demand(field, wanted, f"config.json has {wanted}")
    size = file.config.get("size") or {}
    layout.min_pixels = file.config.get("min_pixels") or size.get("shortest_edge") or layout.min_pixels
    layout.max_pixels = file.config.get("max_pixels") or size.get("longest_edge") or layout.max_pixels


def _image_processor(folder: Path) -> _File | None:
    """transformers 4 writes preprocessor_config.json; transformers 5 a section of processor_config.json."""
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        config = content if section is None else content.get(section)
        if isinstance(config, dict):
            return _File(path=path, config=config)
    return None


def preprocessor_config(cfg: ModelConfig, part: str | None = None) -> dict[str, Any]:
    """preprocessor_config.json that gives the tower our pixels, within the resizing's two levels.

    part: vision, for a tower alone, or for a model of no family: squares, whatever the layout.
    """
    v, layout = cfg.vision, cfg.layout
    family = FAMILIES.get(cfg.family) if part is None else None
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        "resample": FILTERS[layout.resample],
        "rescale_factor": 1 / 255,
    }
    if family is not None:
        common["processor_class"] = family.processor
    if family is None or cfg.family == "llava":
        return {**_square(cfg), **common}
    return {"image_processor_type": family.image_processor, **_views(cfg), **common}


def _square(cfg: ModelConfig) -> dict[str, Any]:
    size, layout = cfg.vision.image_size, cfg.layout
    aspect = layout.aspect if layout.kind == "square" else "squash"
    side = {"height": size, "width": size}
    ways: dict[str, dict[str, Any]] = {
        # Padding to a square of the mean colour comes first; the square's edge is then resized
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": size}},
        "crop": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}},
        "squash": {"image_processor_type": "CLIPImageProcessor", "size": side},
    }
    return {**ways[aspect], "crop_size": side, "do_center_crop": aspect == "crop"}


def _views(cfg: ModelConfig) -> dict[str, Any]:
    """Of every family but LLaVA-1.5: how its layout cuts."""
    size, layout = cfg.vision.image_size, cfg.layout
    side = {"height": size, "width": size}
    if layout.kind == "square":
        return {"size": side}
    if layout.kind == "anyres":
        if cfg.family == "llava_next":
            sizes = {"size": {"shortest_edge": size}, "crop_size": side, "do_center_crop": True}
        else:
            sizes = {"size": side}
        return {**sizes, "image_grid_pinpoints": layout.pinpoints, "do_pad": True}
    if layout.kind == "canvas":
        return {"size": side, "max_image_tiles": layout.max_tiles, "do_pad": True}
    if layout.kind in ("tiles", "ovis"):
        covering = {"use_covering_area_grid": True} if layout.kind == "ovis" else {}
        tiles = {"min_patches": layout.min_tiles, "max_patches": layout.max_tiles}
        return {"size": side, "crop_to_patches": True, **tiles, **covering}
    if layout.kind == "rows":
        longest = {"size": {"longest_edge": layout.longest_edge or 4 * size}, "max_image_size": {"longest_edge": size}}
        return {**longest, "do_image_splitting": True, "do_pad": True}
    return {
        "min_pixels": layout.min_pixels,
        "max_pixels": layout.max_pixels,
        "size": {"shortest_edge": layout.min_pixels, "longest_edge": layout.max_pixels},
        "patch_size": cfg.vision.patch_size,
        "temporal_patch_size": cfg.vision.temporal_patch_size,
        "merge_size": cfg.reduce.factor,
    }


def processor_config(cfg: ModelConfig) -> dict[str, Any]:
    """processor_config.json: how many placeholders the family's processor puts in for an image."""
    v, named = cfg.vision, {"processor_class": FAMILIES[cfg.family].processor}
    strategy = "default" if v.class_token and not v.keep_class_token else "full"
    if cfg.family in ("llava", "llava_next"):
        return {
            **named,
            "image_token": "<image>",
            "patch_size": v.patch_size,
            "num_additional_image_tokens": int(v.class_token),
            "vision_feature_select_strategy": strategy,
        }
    tokens = view_tokens(cfg)
    if cfg.family == "llava_onevision":
        ratio = f"anyres_max_{cfg.layout.max_unpadded or 10**6}"
        counts = {"num_image_tokens": tokens, "image_token": "<image>", "video_token": "<video>"}
        return {**named, **counts, "vision_feature_select_strategy": strategy, "vision_aspect_ratio": ratio}
    counted = {
        "internvl": "image_seq_length",
        "ovis2": "image_seq_length",
        "gemma3": "image_seq_length",
        "idefics3": "image_seq_len",
        "smolvlm": "image_seq_len",
        "blip2": "num_query_tokens",
    }
    return {**named, counted[cfg.family]: tokens} if cfg.family in counted else named
