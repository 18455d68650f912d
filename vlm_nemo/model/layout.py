"""What a model wants of an image, in the data engine's words."""

from __future__ import annotations

from vlm_nemo.data.layout.spec import ImageSpec, image_spec
from vlm_nemo.data.layout.tiles import INDICATORS
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError


def spec_of(cfg: ModelConfig) -> ImageSpec:
    """Layout, sizes and reduction of a model. Raises UserError where they do not fit one another."""
    vision, projector = cfg.vision, cfg.projector
    _check_extra_rows(cfg)
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


def _check_extra_rows(cfg: ModelConfig) -> None:
    """That the projector has the rows which the layout puts between an image's embeddings. Raises UserError."""
    projector = cfg.projector
    if projector.kind == "cross_attention":  # nothing is put anywhere
        return
    if cfg.layout.kind == "anyres" and not projector.newline:
        raise UserError(
            "model.layout.kind=anyres ends every row of tiles with a learned vector, but model.projector.newline=false "
            "has none; set model.projector.newline=true (of model.projector.kind=mlp), or another layout"
        )
    marks = len(INDICATORS)
    if cfg.layout.kind == "ovis" and (projector.kind != "visual_vocabulary" or projector.indicators < marks):
        raise UserError(
            f"model.layout.kind=ovis puts {marks} marks around and between tiles, but model.projector.kind="
            f"{projector.kind} with indicators={projector.indicators} has none for them; set "
            f"model.projector.kind=visual_vocabulary and indicators={marks}, or another layout"
        )
