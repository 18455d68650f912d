"""A tiny decoder that looks at images, and rows for it. No transformers here: ranks import this."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import tiny
from vlm_nemo.model.config import ModelConfig, ProjectorConfig
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch

Sample = tuple[list[int], list[int]]
"""Tokens, and how many views of four patches each image has."""

SAMPLES: list[Sample] = [
    ([9, 8, tiny.IMAGE, 7, 6, tiny.IMAGE, tiny.IMAGE, 5, 10, 11, 12], [1, 3, 2]),
    ([20, 21, 22, 23, 24], []),
    ([tiny.IMAGE, 30, 31, 32, 33, 34, 35], [2]),
]
"""Two images side by side, no image, an image at the very start."""


def looking_model() -> ModelConfig:
    cfg = tiny.tiny_model(cross_attention_layers=[1, 3])
    cfg.projector = ProjectorConfig(kind="cross_attention")
    return cfg


def pictures(samples: list[Sample]) -> Images[Tensor]:
    views = [n for _, counts in samples for n in counts]
    tokens = torch.tensor([t for ids, _ in samples for t in ids])
    generator = torch.Generator().manual_seed(5)
    return Images(
        patches=torch.randint(0, 256, (4 * sum(views), 192), generator=generator, dtype=torch.uint8),
        grids=torch.full((sum(views), 2), 2),
        views=torch.tensor(views, dtype=torch.int64),
        embeddings=4 * torch.tensor(views, dtype=torch.int64),
        slots=(tokens == tiny.IMAGE).nonzero().flatten(),
        sources=torch.zeros(0, dtype=torch.int64),
    )


def row(samples: list[Sample], capacity: int) -> PackedBatch:
    lengths = [len(ids) for ids, _ in samples]
    tail = capacity - sum(lengths)
    tokens = torch.tensor([t for ids, _ in samples for t in ids] + [tiny.PAD] * tail)
    labels = torch.cat((tokens[1:], tokens[:1]))
    labels[(labels == tiny.IMAGE) | (labels == tiny.PAD)] = IGNORE_INDEX
    lengths += [tail] if tail else []
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        positions=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1).contiguous(),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        images=pictures(samples),
        samples=len(samples),
        used_tokens=capacity - tail,
    )
