"""A packed row on its way into the model: checked on the CPU, then moved to the device without a sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.context import cut_segments
from vlm_nemo.model.head import targets_of
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.looks import Looks, make_looks
from vlm_nemo.model.segments import Segments, make_segments
from vlm_nemo.model.share import Place, Share, share_views
from vlm_nemo.model.views import Features, VisionBatch, blank_batch, blank_view, grids_of, vision_batch
from vlm_nemo.types import Images, PackedBatch


@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """What VLM.forward takes. B is 1: one packed row, or a context rank's part of it, whose T is that of its tokens."""

    tokens: Tensor
    """[1, T] int64"""
    supervised: Tensor
    """[S] int64: the tokens that have a label (`vlm_nemo.model.head.Targets`); one stand-in where none has"""
    labels: Tensor
    """[S] int64: theirs"""
    loss_mask: Tensor
    """[S] float32: 1, 0 for the stand-in"""
    positions: Tensor
    """[3, 1, T] int64"""
    segments: Segments | CachedStep
    views: VisionBatch | Features | None
    """One blank view where the row has none, so that every rank runs the same layers; None in a step of generation,
    which does not train."""
    image_slots: Tensor
    """[M] int64: the placeholders among these tokens, in the row's order; empty where there are none"""
    image_sources: Tensor
    """[M] int64: the row of [embeddings, then the projector's extra rows] that stands there; [M, 4] with shares"""
    image_shares: Tensor | None = None
    """[M, 4] float32: how much of each of four rows; None = all of one"""
    keep: Callable[[Tensor], None] | None = None
    """Takes what the tower made of the views, [N, D], to keep it."""
    share: Share | None = None
    """Where views are this rank's share of the row's: where everyone's embeddings go."""


def count_embeddings(images: Images[Tensor], tokens: Tensor, cfg: ModelConfig, image_token: int) -> int:
    """E, what the images' views give, once they are checked against the tokens [T] that they stand among.

    Raises ValueError with both counts where placeholders and images disagree: half an image is never merged.
    """
    spec = spec_of(cfg)
    total = sum(features_of(images, cfg))
    if spec.tiles is not None:  # of those that fill an image up, too
        total = images.count * spec.tiles * view_tokens(spec, spec.grid)
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


def features_of(images: Images[Tensor], cfg: ModelConfig) -> list[int]:
    """Of every image: what its own views give."""
    spec = spec_of(cfg)
    each = [view_tokens(spec, (rows, columns)) for rows, columns in images.grids.tolist()]
    ends = [0, *images.views.cumsum(0).tolist()]
    return [sum(each[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


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
    return make_looks(bounds, images.slots.tolist(), images.embeddings.tolist(), features_of(images, cfg))


def looked(row: PackedBatch, cfg: ModelConfig) -> list[tuple[int, int]]:
    """So many tokens look at so many features, in each layer of the decoder that looks at images."""
    looks = looks_of(row.images, row.cu_seqlens.tolist(), cfg)
    ranges = () if looks is None else looks.ranges
    return [(stop - start, sum(last - first for first, last in spans)) for start, stop, spans in ranges]


def model_batch(
    row: PackedBatch,
    cfg: ModelConfig,
    *,
    image_token: int,
    device: torch.device,
    context: Place = (0, 1),
    sharing: Place = (0, 1),
) -> ModelBatch:
    """Check a row and move it; of several context ranks', the part that this one takes (context.py).

    sharing: `VLM.image_place`, by which this rank embeds some of the row's views (share.py); without it every rank
    embeds all of them, which gives the same and takes longer.
    Raises ValueError as `count_embeddings` does.
    """
    images, share = row.images, None
    embeddings = 0
    views: VisionBatch | Features
    if row.features is not None:
        embeddings = count_embeddings(images, row.tokens, cfg, image_token)
        grids, tiles = grids_of(images.grids), cfg.vision.tiles
        views = Features(rows=row.features, grids=grids if tiles is None else grids[:1] * (images.count * tiles))
    elif len(images.patches):
        embeddings = count_embeddings(images, row.tokens, cfg, image_token)
        if sharing[1] > 1:
            views, share = share_views(images.patches, images.grids, cfg, sharing, images.tilings)
        else:
            views = vision_batch(images.patches, images.grids, cfg.vision, images.tilings)
    else:  # none, or on a later pipeline stage, which gets no pixels
        if (row.tokens == image_token).any():
            raise ValueError("the row has image placeholders and no images")
        views = blank_batch(cfg.vision, spec_of(cfg).factor)
        if sharing[1] > 1:  # what each rank gives has weight zero; those of the first are as good as any
            share = share_views(*blank_view(cfg.vision, spec_of(cfg).factor), cfg, sharing, torch.tensor([[1, 1]]))[1]
    whole = cfg.language.image_attention == "bidirectional"
    blocks = image_blocks(images.slots, len(row.tokens)) if whole else None
    segments = make_segments(row.cu_seqlens, row.used_tokens, blocks=blocks)
    segments.looks = looks_of(images, row.cu_seqlens.tolist(), cfg)
    tokens, labels, positions = row.tokens, row.labels, row.positions
    slots, sources, shares = images.slots, rows_of(images.sources, embeddings), images.shares
    rank, ranks = context
    if ranks > 1:
        held, segments = cut_segments(segments, ranks, rank)
        tokens, labels, positions = tokens[held], labels[held], positions[:, held]
        if segments.looks is None:
            slots, there = cut_slots(slots, held, len(row.tokens))
            sources, shares = sources[there], None if shares is None else shares[there]
    targets = targets_of(labels)

    def move(x: Tensor) -> Tensor:
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True)
        return x

    return ModelBatch(
        tokens=move(tokens).unsqueeze(0),
        supervised=move(targets.rows),
        labels=move(targets.labels),
        loss_mask=move(targets.weights),
        positions=move(positions).unsqueeze(1),
        segments=segments.moved(move),
        views=views.moved(move),
        image_slots=move(slots),
        image_sources=move(sources),
        image_shares=None if shares is None else move(shares),
        share=None if share is None else share.moved(move),
    )


def cut_slots(slots: Tensor, held: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where placeholders stand among the tokens that are held, and which of them do.

    ([1 2 5], [4 5 6 7 0 1], 8) -> [5 1], [True False True]
    """
    here = torch.full((length,), -1)
    here[held] = torch.arange(len(held))
    found = here[slots]
    return found[found >= 0], found >= 0
