"""Our model as a backend of the engine, under any tensor x pipeline layout: every rank runs the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_nemo.infer.backend import Row
from vlm_nemo.model.batch import ModelBatch, image_slots
from vlm_nemo.model.cache import KVCache, cached_step
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import output_tokens
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.types import UserError


class TorchBackend:
    """A VLM with its cache (`infer.backend.Backend`)."""

    def __init__(self, chunk: VLM, cfg: ModelConfig, ranks: Ranks, image_token: int, slots: int, capacity: int) -> None:
        """chunk: this rank's stage, its weights set; built without sequence parallelism, whose rows would have to be
        multiples of the tensor size."""
        self.slots, self.capacity = slots, capacity
        self._chunk, self._cfg, self._ranks, self._image_token = chunk.eval(), cfg, ranks, image_token
        self._cache = KVCache(slots, capacity)

    def reserve(self) -> None:
        """Take the memory of the whole cache now, with a first step. Raises UserError where it does not fit."""
        self._cache.reserve()
        try:
            self.run([Row(slot=0, start=0, tokens=(0 if self._image_token else 1,))])
        except torch.OutOfMemoryError:
            raise UserError(
                f"the memory of this device does not hold infer.slots={self.slots} sequences of {self.capacity} tokens "
                "beside the model; lower infer.slots or infer.context"
            ) from None

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See Backend.run."""
        # Both are thread-local: a server's engine runs in a thread of its own
        with device.adapter(), torch.no_grad():
            order = sorted(range(len(rows)), key=lambda i: rows[i].start > 0)  # prompts first
            logits = self._logits([rows[i] for i in order])
            back = np.empty(len(rows), dtype=np.int64)
            back[order] = np.arange(len(rows))
            return logits[back]

    def _logits(self, rows: list[Row]) -> NDArray[np.float32]:
        batch = self._batch(rows)
        embeds = None
        if self._chunk.pre_process:
            embeds = self._chunk.embed_images(batch.images) if len(batch.images) else self._no_images(batch)

        def step(batches: Iterator[ModelBatch], model: nn.Module) -> tuple[Tensor, Any]:
            logits = model(next(batches), gather_logits=True, image_embeds=embeds)
            return logits, lambda output, non_loss_data=False: output

        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([batch]),
            model=self._chunk,
            num_microbatches=1,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self._ranks.last_stage:
            logits = outputs[0][0].float().contiguous()
        else:
            logits = torch.empty(len(rows), self._cfg.language.vocab_size, device=device.device())
        if self._ranks.pipeline > 1:
            dist.broadcast(logits, src=groups.last_stage_rank(), group=groups.pipeline_group())
        return logits.cpu().numpy()

    def _batch(self, rows: list[Row]) -> ModelBatch:
        size, per_image = self._cfg.vision.image_size, output_tokens(self._cfg.vision)
        tokens = [torch.tensor(row.tokens) for row in rows]
        images = [torch.from_numpy(row.images) if row.images is not None else _nothing(size) for row in rows]
        places, at = [], 0
        for ids, pictures in zip(tokens, images, strict=True):
            places.append(at + image_slots(ids, self._image_token, len(pictures), per_image))
            at += len(ids)
        where = device.device()
        segments = cached_step(self._cache, [(row.slot, row.start, len(row.tokens)) for row in rows], where)
        assert segments.positions is not None
        unused = torch.zeros(1, at, device=where)
        return ModelBatch(
            tokens=torch.cat(tokens).to(where).unsqueeze(0),
            labels=unused.long(),
            loss_mask=unused,
            positions=segments.positions.expand(3, 1, -1),
            segments=segments,
            images=torch.cat(images).to(where),
            image_slots=torch.cat(places).to(where),
        )

    def _no_images(self, batch: ModelBatch) -> Tensor:
        """[0, P, D]: a step without images does not run the tower."""
        dtype = self._chunk.config.params_dtype
        shape = (0, output_tokens(self._cfg.vision), self._cfg.language.hidden_size)
        return torch.empty(shape, dtype=dtype, device=batch.tokens.device)


def _nothing(size: int) -> Tensor:
    return torch.empty(0, 3, size, size, dtype=torch.uint8)
