"""The model that an export is compared with: our own, in fp32, a whole sequence at a time and without any cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.views import patchify, vision_batch
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch


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
        self._cfg = cfg
        self._image_token = image_token

    @torch.no_grad()
    def image_embeds(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        views = self._views(images)
        rows = self._model.embed_images(vision_batch(*views, self._cfg.vision).moved(_to_device))
        return rows.unflatten(0, (len(images), -1)).cpu().numpy()

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], images: NDArray[np.uint8]) -> NDArray[np.float32]:
        count, ids = len(tokens), torch.from_numpy(tokens)
        slots = (ids == self._image_token).nonzero().flatten()
        patches, grids = self._views(images)
        nothing = torch.full((count,), IGNORE_INDEX)
        row = PackedBatch(
            tokens=ids,
            labels=nothing,
            positions=torch.arange(count).expand(3, -1),
            cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
            images=Images(
                patches=patches,
                grids=grids,
                views=torch.ones(len(images), dtype=torch.int64),
                embeddings=torch.full((len(images),), len(slots) // max(1, len(images))),
                slots=slots,
                sources=torch.arange(len(slots)),
            ),
            samples=1,
            used_tokens=count,
        )
        batch = model_batch(row, self._cfg, image_token=self._image_token, device=device.device())
        return self._model(batch, gather_logits=True)[0].float().cpu().numpy()

    def _views(self, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """[n, 3, S, S] -> patches and grids of as many views."""
        grid = spec_of(self._cfg).grid
        return patchify(torch.from_numpy(images), self._cfg.vision.patch_size), torch.tensor([grid] * len(images)).view(
            -1, 2
        )


def _to_device(x: Tensor) -> Tensor:
    return x.to(device.device())
