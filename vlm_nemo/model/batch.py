"""A packed row on its way into the model: checked on the CPU, then moved to the device without a sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.balance import Balance, make_balance
from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.looks import Looks, make_looks
from vlm_nemo.model.segments import Segments, make_segments
from vlm_nemo.model.views import VisionBatch, blank_view, vision_batch
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch


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
    views: VisionBatch | None
    """One blank view where the row has none, so that every rank runs the same layers; None in a step of generation,
    which does not train."""
    image_slots: Tensor
    """[M] int64: the row's placeholders in order; empty where the row has no images"""
    image_sources: Tensor
    """[M] int64: the row of [embeddings, then the projector's extra rows] that stands there; [M, 4] with shares"""
    image_shares: Tensor | None = None
    """[M, 4] float32: how much of each of four rows; None = all of one"""


def count_embeddings(images: Images[Tensor], tokens: Tensor, cfg: ModelConfig, image_token: int) -> int:
    """E, what the images' views give, once they are checked against the tokens [T] that they stand among.

    Raises ValueError with both counts where placeholders and images disagree: half an image is never merged.
    """
    spec = spec_of(cfg)
    total = sum(view_tokens(spec, (rows, columns)) for rows, columns in images.grids.tolist())
    reserved = int(images.embeddings.sum())
    if total != reserved:
        raise ValueError(f"the row's images were laid out for {reserved} embeddings, but the model gives {total}")
    there = tokens == image_token
    if spec.cross_attention:
        placeholders, merged, whole = int(there.sum()), images.count, bool(there[images.slots].all())
    else:
        first = images.sources if images.shares is None else images.sources[:, 0]
        taken = first >= 0
        placeholders, merged = int(there.sum()), int(there[images.slots].sum())
        ends = images.embeddings.cumsum(0)
        seen = torch.bucketize(first[taken], ends, right=True).unique().numel()
        whole = bool(there[images.slots[taken]].all()) and seen == images.count
    if placeholders != merged or not whole:
        raise ValueError(
            f"the row has {placeholders} image placeholders but {images.count} images of {total} embeddings, which go "
            f"to {merged} of them; they must be equal"
        )
    return total


def rows_of(sources: Tensor, embeddings: int) -> Tensor:
    """Images' sources as rows of [embeddings, extra rows]: 3 -> 3, -1 -> E, -2 -> E + 1."""
    return torch.where(sources < 0, embeddings - 1 - sources, sources)


def image_blocks(slots: Tensor, length: int) -> Tensor:
    """([2 3 4 6 7], 9) -> [-1 -1 0 0 0 -1 1 1 -1]: one number for each run of neighbouring placeholders, -1 for text.

    A row's images are such runs: every layout whose images see themselves whole has text between two of them.
    """
    blocks = torch.full((length,), -1)
    if len(slots):
        starts = torch.ones_like(slots)
        starts[1:] = slots[1:] != slots[:-1] + 1
        blocks[slots] = starts.cumsum(0) - 1
    return blocks


def looks_of(images: Images[Tensor], bounds: list[int], cfg: ModelConfig) -> Looks | None:
    """Who attends to which image, of samples with these bounds; None where no layer looks at images."""
    if not cfg.language.cross_attention_layers:
        return None
    return make_looks(bounds, images.slots.tolist(), images.embeddings.tolist())


def balance_of(row: PackedBatch, cfg: ModelConfig) -> Balance | None:
    """How much each token counts in the losses of experts' use; None where there are none."""
    moe = cfg.language.moe
    if moe.experts is None or not (moe.aux_loss or moe.z_loss):
        return None
    return make_balance(row.cu_seqlens, row.supervised_by_segment())


def model_batch(row: PackedBatch, cfg: ModelConfig, *, image_token: int, device: torch.device) -> ModelBatch:
    """Check a row and move it. Raises ValueError as `count_embeddings` does."""
    images = row.images
    patches, grids, embeddings = images.patches, images.grids, 0
    if len(patches):
        embeddings = count_embeddings(images, row.tokens, cfg, image_token)
    else:  # none, or on a later pipeline stage, which gets no pixels
        if (row.tokens == image_token).any():
            raise ValueError("the row has image placeholders and no images")
        patches, grids = blank_view(cfg.vision, spec_of(cfg).factor)
    whole = cfg.language.image_attention == "bidirectional"
    blocks = image_blocks(images.slots, len(row.tokens)) if whole else None
    segments = make_segments(row.cu_seqlens, row.used_tokens, blocks=blocks)
    segments.looks = looks_of(images, row.cu_seqlens.tolist(), cfg)
    segments.balance = balance_of(row, cfg)
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
        segments=segments.moved(move),
        views=vision_batch(patches, grids, cfg.vision).moved(move),
        image_slots=move(images.slots),
        image_sources=move(rows_of(images.sources, embeddings)),
        image_shares=None if images.shares is None else move(images.shares),
    )
