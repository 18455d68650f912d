"""How an image becomes pixels and placeholders, both ways: Hugging Face's processor files and our VisionConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_nemo.model.config import VisionConfig
from vlm_nemo.types import IMAGE_MARKER, UserError

BICUBIC = 3
"""PIL's number of the filter that ours comes within two levels of."""


def read_preprocessing(folder: Path, vision: VisionConfig) -> VisionConfig:
    """The tower's configuration with mean, std and aspect as the folder's image processor has them.

    Without any such file it is CLIP's own: its colours, the centre crop. Raises UserError naming a field and its value
    where the processor does something else with pixels than we do.
    """
    found = _image_processor(folder)
    if found is None:
        return vision
    where, config = found

    def refuse(field: str, only: str) -> UserError:
        return UserError(f"{where}: {field}={config.get(field)!r} is not something this version does; {only}")

    for field in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(field, True) is not True:
            raise refuse(field, "it does true")
    if config.get("resample", BICUBIC) != BICUBIC:
        raise refuse("resample", f"it does {BICUBIC} (bicubic)")
    if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise refuse("rescale_factor", "it does 1/255")
    size = vision.image_size
    aspect = _aspect(config, size)
    if aspect is None:
        raise refuse("size", f"the vision tower takes squares of {size} pixels")
    mean, std = config.get("image_mean") or vision.mean, config.get("image_std") or vision.std
    return replace(vision, aspect=aspect, mean=list(mean), std=list(std))


def _aspect(config: Mapping[str, Any], size: int) -> str | None:
    """pad | crop | squash; None where another size comes out."""
    target, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    if config.get("do_pad", False):
        return "pad" if size in (target or (size,)) else None
    if config.get("do_center_crop", True):
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


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]] | None:
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
            return path, config
    return None


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json that gives the tower our pixels, within the resizing's two levels."""
    size = vision.image_size
    square = {"height": size, "width": size}
    ways: dict[str, dict[str, Any]] = {
        # Padding to a square of the mean colour comes first; the square's edge is then resized
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": size}},
        "crop": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}},
        "squash": {"image_processor_type": "CLIPImageProcessor", "size": square},
    }
    return {
        **ways[vision.aspect],
        "crop_size": square,
        "do_center_crop": vision.aspect == "crop",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "processor_class": "LlavaProcessor",
    }


def processor_config(vision: VisionConfig) -> dict[str, Any]:
    """processor_config.json: how many placeholders LlavaProcessor puts in for an image."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_MARKER,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
    }
