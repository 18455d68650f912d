"""The tiny model and rows that the tests share."""

from __future__ import annotations

import torch

from tests.squares import squares
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.packing import as_tensors
from vlm_nemo.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch

IMAGE, PAD = 3, 0
TOKENS_PER_IMAGE = 4


def tiny_model(**language: object) -> ModelConfig:
    """Four language layers (so that pipeline x virtual = 4 fits), four heads, images of four patches."""
    return ModelConfig(
        layout=LayoutConfig(aspect="squash"),
        vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_layers=3, num_heads=4, ffn_hidden_size=32),
        projector=ProjectorConfig(),
        language=LanguageConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            **language,  # type: ignore[arg-type]
        ),
        init_std=0.1,
    )


def sample(seed: int, length: int, images: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [length], shifted labels [length], images [images, 3, 16, 16]; the second half is supervised."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 60, (length,), generator=g)
    for i in range(images):
        tokens[1 + i * (TOKENS_PER_IMAGE + 1) :][:TOKENS_PER_IMAGE] = IMAGE
    labels = torch.full((length,), IGNORE_INDEX)
    labels[length // 2 : -1] = tokens[length // 2 + 1 :]
    labels[labels == IMAGE] = IGNORE_INDEX
    return tokens, labels, torch.randint(0, 256, (images, 3, 16, 16), generator=g, dtype=torch.uint8)


def images(tokens: torch.Tensor, pixels: torch.Tensor) -> Images[torch.Tensor]:
    """[n, 3, 16, 16], in the placeholders' places."""
    found = squares(pixels.numpy(), tokens.tolist(), IMAGE, patch=8)
    assert found is not None
    return as_tensors(found)


def row(samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], capacity: int) -> PackedBatch:
    """Pack samples side by side, without the project's own packer, so that it can be a witness."""
    lengths = [len(s[0]) for s in samples]
    used = sum(lengths)
    tail = capacity - used
    assert tail >= 0
    cu = [0]
    for n in [*lengths, *([tail] if tail else [])]:
        cu.append(cu[-1] + n)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(cu, cu[1:], strict=False)])
    return PackedBatch(
        tokens=torch.cat([*(s[0] for s in samples), torch.full((tail,), PAD)]),
        labels=torch.cat([*(s[1] for s in samples), torch.full((tail,), IGNORE_INDEX)]),
        positions=positions.expand(3, -1).contiguous(),
        cu_seqlens=torch.tensor(cu, dtype=torch.int32),
        images=images(torch.cat([s[0] for s in samples]), torch.cat([s[2] for s in samples])),
        samples=len(samples),
        used_tokens=used,
    )


def rows(count: int, capacity: int = 48, seed: int = 0) -> list[PackedBatch]:
    """Rows with uneven samples: none, one and two images; the second row has no image at all."""
    made = []
    for i in range(count):
        s = seed + 10 * i
        if i % 4 == 1:
            made.append(row([sample(s, 9, 0), sample(s + 1, 20, 0)], capacity))
        else:
            made.append(row([sample(s, 12), sample(s + 1, 19, 2), sample(s + 2, 8 + i % 3, 0)], capacity))
    return made
