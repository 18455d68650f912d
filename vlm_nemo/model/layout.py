"""What a model wants of an image, in the data engine's words."""

from __future__ import annotations

from vlm_nemo.data.layout.spec import ImageSpec, image_spec
from vlm_nemo.model.config import ModelConfig


def spec_of(cfg: ModelConfig) -> ImageSpec:
    """Layout, sizes and reduction of a model. Raises UserError where they do not fit one another."""
    vision, projector = cfg.vision, cfg.projector
    return image_spec(
        cfg.layout,
        size=vision.image_size,
        patch=vision.patch_size,
        class_token=vision.class_token and vision.keep_class_token,
        reduce=cfg.reduce.kind,
        factor=cfg.reduce.factor,
        queries=projector.num_queries if projector.kind in ("qformer", "perceiver") else None,
        mean=tuple(vision.mean),
        mrope=bool(cfg.language.mrope_section),
        cross_attention=projector.kind == "cross_attention",
        tiles=vision.tiles,
    )
