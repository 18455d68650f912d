"""A packed row on its way into the model: checked on the CPU, then moved to the device without a sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.segments import Segments, make_segments
from vlm_nemo.types import IGNORE_INDEX, PackedBatch


@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """What VLM.forward takes. B is 1: one packed row."""

    tokens: Tensor
    """[1, T] int64"""
    labels: Tensor
    """[1, T] int64, 0 where the loss is masked"""
    loss_mask: Tensor
    """[1, T] float32: 1 where supervised"""
    positions: Tensor
    """[3, 1, T] int64"""
    segments: Segments | CachedStep
    images: Tensor
    """[N, 3, H, W] uint8; one blank image where the row has none, so that every rank runs the same layers"""
    image_slots: Tensor
    """[N * P] int64: the row's placeholders in order; empty where the row has no images"""


def image_slots(tokens: Tensor, image_token: int, images: int, tokens_per_image: int) -> Tensor:
    """[N * P] int64: where the placeholders are among tokens [T].

    Raises ValueError with both counts where they are not as many as the images' embeddings.
    """
    slots = (tokens == image_token).nonzero().flatten()
    if slots.numel() != images * tokens_per_image:
        raise ValueError(
            f"the row has {slots.numel()} image placeholders but {images} images of {tokens_per_image} embeddings "
            f"({images * tokens_per_image}); they must be equal"
        )
    return slots


def model_batch(
    row: PackedBatch, *, image_token: int, tokens_per_image: int, image_size: int, device: torch.device
) -> ModelBatch:
    """Check a row and move it. Raises ValueError as `image_slots` does: half an image is never merged."""
    count = row.images.shape[0]
    slots = image_slots(row.tokens, image_token, count, tokens_per_image)
    images = row.images if count else torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    supervised = row.labels != IGNORE_INDEX

    def move(x: Tensor) -> Tensor:
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True)
        return x

    return ModelBatch(
        tokens=move(row.tokens).unsqueeze(0),
        labels=move(row.labels.masked_fill(~supervised, 0)).unsqueeze(0),
        loss_mask=move(supervised.float()).unsqueeze(0),
        positions=move(row.positions).unsqueeze(1),
        segments=make_segments(row.cu_seqlens, row.used_tokens).moved(move),
        images=move(images),
        image_slots=move(slots),
    )
