"""A tiny LLaVA of transformers and its exports, which the tests here and in tests/infer share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_nemo import cli
from vlm_nemo.model.config import VisionConfig

CAPACITY = 48
IMAGE = 3


def export(*words: object, code: int = 0) -> None:
    """`vlm-nemo export …` in this process."""
    assert cli.main(["export", *(str(word) for word in words)]) == code


class TransformersReference:
    """transformers' model in the words of a parity report's reference."""

    def __init__(self, model: Any) -> None:
        self.model = model
        vision = VisionConfig()
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (vision.mean, vision.std))

    def pixels(self, images: NDArray[np.uint8] | None) -> torch.Tensor | None:
        if images is None or not len(images):
            return None
        return (torch.from_numpy(images).float() - self.mean) / self.std

    @torch.no_grad()
    def image_embeds(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = self.model.get_image_features(pixel_values=self.pixels(images))
        found = getattr(found, "pooler_output", found)
        return torch.stack(list(found)).numpy()

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], images: NDArray[np.uint8] | None) -> NDArray[np.float32]:
        return self.model(input_ids=torch.from_numpy(tokens)[None], pixel_values=self.pixels(images)).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, tokens: NDArray[np.int64], images: NDArray[np.uint8] | None, count: int) -> list[int]:
        ids, pixels = torch.from_numpy(tokens)[None], self.pixels(images)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({} if pixels is None else {"pixel_values": pixels}),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, len(tokens) :].tolist()


def prompts(per_image: int = 4, seed: int = 0) -> list[tuple[NDArray[np.int64], NDArray[np.uint8] | None]]:
    """Prompts of uneven length with 0, 1 and 2 images."""
    rng = np.random.default_rng(seed)
    made = []
    for images, length in ((0, 7), (1, 13), (2, 19)):
        tokens = rng.integers(4, 300, length)
        for i in range(images):
            tokens[1 + i * (per_image + 1) :][:per_image] = IMAGE
        pixels = rng.integers(0, 256, (images, 3, 16, 16), dtype=np.uint8) if images else None
        made.append((tokens, pixels))
    return made


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
