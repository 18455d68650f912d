"""Our model as a backend of the engine, under any tensor x pipeline layout: every rank runs the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_nemo.data.packing import as_tensors, join_images
from vlm_nemo.infer.backend import Row
from vlm_nemo.model.batch import ModelBatch, count_embeddings, image_blocks, looks_of, rows_of
from vlm_nemo.model.cache import KVCache, cached_step
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.views import vision_batch
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
        known = None
        if self._chunk.pre_process:
            known = self._chunk.embed_images(batch.views) if batch.views is not None else self._no_rows(batch)

        def step(batches: Iterator[ModelBatch], model: nn.Module) -> tuple[Tensor, Any]:
            logits = model(next(batches), gather_logits=True, image_rows=known)
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
        """The step; a step without images has no views and does not run the tower."""
        cfg, where = self._cfg, device.device()
        tokens = [torch.tensor(row.tokens) for row in rows]
        images = [row.images or join_images([], [], cfg.vision.patch_size) for row in rows]
        for ids, found in zip(tokens, images, strict=True):
            count_embeddings(as_tensors(found), ids, cfg, self._image_token)
        joined = as_tensors(join_images(images, [len(ids) for ids in tokens], cfg.vision.patch_size))
        at = sum(len(ids) for ids in tokens)
        blocks = image_blocks(joined.slots, at) if cfg.language.image_attention == "bidirectional" else None
        lengths = [(row.slot, row.start, len(row.tokens)) for row in rows]
        bounds = [0, *accumulate(len(ids) for ids in tokens)]
        segments = cached_step(self._cache, lengths, where, blocks=blocks, looks=looks_of(joined, bounds, cfg))
        views = vision_batch(joined.patches, joined.grids, cfg.vision, joined.tilings) if joined.count else None
        unused = torch.zeros(0, device=where)
        return ModelBatch(
            tokens=torch.cat(tokens).to(where).unsqueeze(0),
            supervised=unused.long(),
            labels=unused.long(),
            loss_mask=unused,
            positions=torch.cat([_positions(row) for row in rows], dim=1).to(where).unsqueeze(1),
            segments=segments,
            views=None if views is None else views.moved(lambda x: x.to(where)),
            image_slots=joined.slots.to(where),
            image_sources=rows_of(joined.sources, int(joined.embeddings.sum())).to(where),
            image_shares=None if joined.shares is None else joined.shares.to(where),
        )

    def _no_rows(self, batch: ModelBatch) -> Tensor:
        """[0, D]: what no images give."""
        shape = (0, self._cfg.language.hidden_size)
        return torch.empty(shape, dtype=self._chunk.config.params_dtype, device=batch.tokens.device)


def _positions(row: Row) -> Tensor:
    """[3, n]"""
    if row.positions is not None:
        return torch.from_numpy(row.positions)
    return torch.arange(row.start, row.start + len(row.tokens)).expand(3, -1)
