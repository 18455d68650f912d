"""From an image's size to what the language model reserves for it. Pure.

One square view an image today (LLaVA-1.5); tiles and native resolution belong here too, behind `count_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_nemo.types import UserError

ASPECTS = ("pad", "crop", "squash")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What the vision tower expects."""

    size: int
    """Side of the square input, pixels."""
    tokens: int
    """Embeddings, and so placeholders, an image."""
    aspect: str
    """pad | crop | squash: how an image becomes square."""
    mean: tuple[float, ...]
    """Mean colour, 0 to 1: the colour of the padding."""
    patches: int = 0
    """Patches that the tower computes an image; 0 = as many as `tokens`."""


def image_spec(size: int, patch: int, class_token_kept: bool, aspect: str, mean: tuple[float, ...]) -> ImageSpec:
    """(336, 14, False, …) -> 576 tokens. Raises UserError if the patch does not divide the size."""
    if size % patch:
        raise UserError(f"model.vision.image_size={size} is not a multiple of model.vision.patch_size={patch}")
    if aspect not in ASPECTS:
        raise UserError(f"model.vision.aspect={aspect} is unknown; choose one of {', '.join(ASPECTS)}")
    patches = (size // patch) ** 2
    tokens = patches + int(class_token_kept)
    return ImageSpec(size=size, tokens=tokens, aspect=aspect, mean=tuple(mean), patches=patches)


def count_tokens(spec: ImageSpec, size: tuple[int, int]) -> int:
    """Placeholders of an image of (width, height) pixels; with a square view it is the same for every size."""
    del size
    return spec.tokens


def vision_cost(spec: ImageSpec, size: tuple[int, int]) -> int:
    """Patches that the tower computes for an image of (width, height) pixels; with a square view always the same."""
    del size
    return spec.patches or spec.tokens
