"""The model that an export is compared with: our own, in fp32, a whole sequence at a time and without any cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.segments import make_segments
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig


class Reference(Protocol):
    """What a parity report asks of a model."""

    def image_embeds(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, 3, S, S] -> [n, T, D]"""
        ...

    def logits(self, tokens: NDArray[np.int64], images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[T] with placeholders, and their images -> [T, V]"""
        ...


class TorchReference:
    """A `Reference` by the training's own model on one process."""

    def __init__(self, cfg: ModelConfig, image_token: int, load: Callable[[list[nn.Module]], None]) -> None:
        """load: fills the built chunks. Must run inside `device.adapter()` with the groups laid out, as must calls."""
        chunks = build_model(cfg, ParallelConfig(), "fp32", seed=0, fresh=())
        load(list(chunks))
        self._model: VLM = chunks[0].eval()
        self._size = cfg.vision.image_size
        self._image_token = image_token

    @torch.no_grad()
    def image_embeds(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._model.embed_images(torch.from_numpy(images).to(device.device())).cpu().numpy()

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], images: NDArray[np.uint8]) -> NDArray[np.float32]:
        count, to = len(tokens), device.device()
        ids = torch.from_numpy(tokens)
        pixels = torch.from_numpy(images) if len(images) else torch.zeros(1, 3, self._size, self._size).byte()
        batch = ModelBatch(
            tokens=ids[None].to(to),
            labels=torch.zeros(1, count, dtype=torch.int64, device=to),
            loss_mask=torch.zeros(1, count, device=to),
            positions=torch.arange(count, device=to).expand(3, 1, -1),
            segments=make_segments(torch.tensor([0, count], dtype=torch.int32), count).moved(lambda x: x.to(to)),
            images=pixels.to(to),
            image_slots=(ids == self._image_token).nonzero().flatten().to(to),
        )
        return self._model(batch, gather_logits=True)[0].float().cpu().numpy()
