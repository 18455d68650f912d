"""Rows as training would see them, for everything but their pixels: planned on the recipe's data, or assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.encode import Encoder, PlannedSample
from vlm_nemo.data.image import tilings_of
from vlm_nemo.data.layout.plan import NAME, ImagePlan, Ints, Sources, offset
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch, UserError

IMAGE, WORD = 0, 1
"""Token ids of placeholders and of everything else: any model has both."""


def blank_sample(spec: ImageSpec, plans: Sequence[ImagePlan], text: int) -> EncodedSample:
    """Images without content first, then `text` supervised tokens."""
    tokens: list[int] = []
    slots: list[int] = []
    for plan in plans:
        if plan.cross:
            slots.append(len(tokens))
            tokens.append(IMAGE)
        for item in plan.items:
            if isinstance(item, str):
                tokens += [WORD] * _words(item)
                continue
            slots += range(len(tokens), len(tokens) + len(item.sources))
            tokens += [IMAGE] * len(item.sources)
    sources = offset([plan.sources for plan in plans], [plan.embeddings for plan in plans])
    return EncodedSample(
        tokens=tokens + [WORD] * text,
        labels=[IGNORE_INDEX] * len(tokens) + [WORD] * text,
        images=blank_images(spec, plans, np.array(slots, dtype=np.int64), sources),
    )


def blank_images(spec: ImageSpec, plans: Sequence[ImagePlan], slots: Ints, sources: Sources) -> Images[NDArray[Any]]:
    """Images of the right shapes that are black."""
    grids = np.array([grid for plan in plans for grid in plan.grids], dtype=np.int64).reshape(-1, 2)
    return Images(
        patches=np.zeros((int(grids.prod(1).sum()), 3 * spec.patch**2), dtype=np.uint8),
        grids=grids,
        views=np.array([len(plan.grids) for plan in plans], dtype=np.int64),
        embeddings=np.array([plan.embeddings for plan in plans], dtype=np.int64),
        slots=slots,
        sources=sources[0],
        shares=sources[1],
        tilings=tilings_of(plans, spec),
    )


def full_row(spec: ImageSpec, sample: EncodedSample, capacity: int) -> PackedBatch:
    """As many copies as a row takes. Raises UserError if it takes none."""
    count = capacity // len(sample.tokens)
    if not count:
        raise UserError(
            f"the assumed sample has {len(sample.tokens)} tokens and data.pack.capacity is {capacity}; raise it, or "
            "assume a smaller one (check.image, check.text)"
        )
    return pack_batch([sample] * count, capacity, WORD, spec.patch)


def blank_row(encoder: Encoder, planned: Sequence[PlannedSample], capacity: int) -> PackedBatch:
    """A planned row with its own words; no image is read."""
    samples = []
    for one in planned:
        text = encoder.text(one.source, one.record) if one.encoded is None else one.encoded
        images = blank_images(encoder.spec, text.plans, text.slots, (text.sources, text.shares))
        samples.append(EncodedSample(tokens=text.tokens, labels=text.labels, images=images, positions=text.positions))
    return pack_batch(samples, capacity, encoder.tokenizer.pad_id, encoder.spec.patch)


def _words(text: str) -> int:
    """Tokens of a layout's text, roughly: its special tokens, and one for what lies between two of them."""
    return len(NAME.findall(text)) + sum(1 for piece in NAME.split(text) if piece)
