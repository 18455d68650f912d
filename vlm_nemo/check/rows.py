"""Rows as training would see them, for everything but their pixels: planned on the recipe's data, or assumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlm_nemo.data.layout.plan import NAME, ImagePlan
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
    sources: list[np.ndarray] = []
    embeddings = 0
    for plan in plans:
        for item in plan.items:
            if isinstance(item, str):
                tokens += [WORD] * _words(item)
                continue
            slots += range(len(tokens), len(tokens) + len(item.sources))
            tokens += [IMAGE] * len(item.sources)
            sources.append(np.where(item.sources < 0, item.sources, item.sources + embeddings))
        embeddings += plan.embeddings
    grids = [grid for plan in plans for grid in plan.grids]
    images: Images[Tensor] = Images(
        patches=torch.zeros(sum(h * w for h, w in grids), 3 * spec.patch**2, dtype=torch.uint8),
        grids=torch.tensor(grids, dtype=torch.int64).view(-1, 2),
        views=torch.tensor([len(plan.grids) for plan in plans], dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        sources=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *sources])),
        embeddings=torch.tensor([plan.embeddings for plan in plans], dtype=torch.int64),
    )
    labels = [IGNORE_INDEX] * len(tokens) + [WORD] * text
    return EncodedSample(tokens=tokens + [WORD] * text, labels=labels, images=images)


def full_row(spec: ImageSpec, sample: EncodedSample, capacity: int) -> PackedBatch:
    """As many copies as a row takes. Raises UserError if it takes none."""
    count = capacity // len(sample.tokens)
    if not count:
        raise UserError(
            f"the assumed sample has {len(sample.tokens)} tokens and data.pack.capacity is {capacity}; raise it, or "
            "assume a smaller one (check.image, check.text)"
        )
    return pack_batch([sample] * count, capacity, pad_id=WORD, patch=spec.patch)


def _words(text: str) -> int:
    """Tokens of a layout's text, roughly: its special tokens, and one for what lies between two of them."""
    return len(NAME.findall(text)) + sum(1 for piece in NAME.split(text) if piece)
