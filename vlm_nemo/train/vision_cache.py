"""The cache of a frozen tower's features as training uses it: which tower it is, and keeping what it makes.

`vlm_nemo.data.features` has the files. The reader of each replica (the first stage's first tensor rank) looks images up
before it decodes them, and keeps what the tower made of the others; its peers get features as they get pixels.

What is read back is what the tower gave, to the bit, and a row of which an image is missing goes through the tower as a
whole, as it would without the cache: so a run over rows that were kept before has the losses of one without, to the
bit. In other rows (another epoch) an image has the features of the row that it was first seen in. They are the same
bits where the device's matrix products round a patch alike whatever stands beside it; else the last bit may differ.
Where ranks would share a row's images out, with the cache each embeds all of them: that is done once an image, and
the losses are those without the cache but for the order of additions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_nemo.data.augment import changes_images
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.features import FeatureStore, feature_rows
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, exchange, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.layout import vision_layout
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch, UserError

log = logging.getLogger(__name__)

FORMAT = 1
"""Of what decoding, cutting and the tower's own code make of the same bytes: raised when any of them changes."""
_AHEAD = 64
"""Micro-batches that wait for the disk at most; then training waits too."""


def check_cache(data: DataConfig, optim: OptimConfig) -> None:
    """Refuse what cannot be kept. Raises UserError."""
    if data.vision_cache is None:
        return
    if optim.vision_lr is not None:
        raise UserError(
            f"data.vision_cache keeps what a frozen tower computes, but optim.vision_lr={optim.vision_lr:g} trains it; "
            "set one of the two to null"
        )
    if changes_images(data.augment):
        raise UserError(
            "data.vision_cache keeps one result an image, but data.augment changes images at random (crop_scale, "
            "brightness, contrast, saturation, hue); turn these off, or set data.vision_cache=null"
        )


def describe(
    vision: nn.Module, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> tuple[str, dict[str, Any]]:
    """(name of the folder, what it stands for): all that features depend on beside an image's bytes.

    The tensor size and the kind of device are in it: they change the last bits. Called by the first stage's ranks
    together: each hashes its share of the weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vision.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
            digest.update(data.view(torch.uint8).numpy().data)
    shares, split = [digest.digest()], vision_layout(parallel).tensor
    if split > 1:
        shares = exchange.gather_bytes(digest.digest(), groups.tensor_group())
    spec = spec_of(cfg)
    layout = {name: value for name, value in asdict(spec.layout).items() if name not in ("before", "after")}
    about = {
        "format": FORMAT,
        "weights": hashlib.sha256(b"".join(shares)).hexdigest(),
        "tower": asdict(cfg.vision),
        "layout": layout | {"size": spec.size, "patch": spec.patch, "mean": list(spec.mean)},
        "dtype": str(dtype).removeprefix("torch."),
        "tensor": split,
        "device": device.device().type,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32], about


class Keeper:
    """Hands what the tower made to a thread that writes it, on the rank that reads. Use `keeping` on every row."""

    def __init__(self, store: FeatureStore, spec: ImageSpec) -> None:
        self._store, self._spec = store, spec
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=_AHEAD)
        self._thread = threading.Thread(target=self._write, name="vlm_nemo.features", daemon=True)
        self._thread.start()

    def keeping(self, batch: ModelBatch, row: PackedBatch) -> ModelBatch:
        """The batch, to be kept when the tower has seen it; as it is where there is nothing to keep."""
        if not row.image_keys:
            return batch
        return replace(batch, keep=partial(self._take, row.image_keys, feature_rows(row.images, self._spec)))

    def _take(self, keys: Sequence[bytes], rows: Sequence[int], features: Tensor) -> None:
        """Called in the middle of a forward: nothing here waits for the device."""
        if sum(rows) != len(features):
            raise RuntimeError(f"the tower gave {len(features)} rows for images of {sum(rows)}")
        features, ready = features.detach(), None
        if features.is_cuda:
            held = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            held.copy_(features, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            features = held
        self._queue.put(partial(self._keep, keys, rows, features, ready))

    def _keep(self, keys: Sequence[bytes], rows: Sequence[int], features: Tensor, ready: Any) -> None:
        if ready is not None:
            ready.synchronize()
        for key, part in zip(keys, features.split(list(rows)), strict=True):
            self._store.add(key, part)

    def _write(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:  # a cache is no reason to lose a run
                log.exception("features could not be kept")

    def close(self) -> None:
        """Write what waits, then end the thread and close the files."""
        self._queue.put(None)
        self._thread.join()
        self._store.close()


def open_store(cfg: DataConfig, ranks: Ranks) -> FeatureStore | None:
    """On the rank that reads; it is of no use before `start_keeping`. Raises UserError."""
    if cfg.vision_cache is None or not ranks.reader:
        return None
    return FeatureStore(cfg.vision_cache, cfg.vision_cache_gb, writers=ranks.data)


def start_keeping(
    store: FeatureStore | None, chunks: Sequence[VLM], cfg: ModelConfig, parallel: ParallelConfig, precision: str
) -> Keeper | None:
    """Open the store for this tower, once its weights are what they will be. All ranks of the first stage call it."""
    if not chunks[0].pre_process:
        return None
    dtype = device.PRECISIONS[precision]
    name, about = describe(chunks[0].vision, cfg, parallel, dtype)
    if store is None:
        return None
    store.open(name, dtype, about)
    return Keeper(store, spec_of(cfg))


def summary(store: FeatureStore | None, folder: str) -> str:
    """What the cache did in this run, over all ranks, which call it together."""
    counts = [store.read_images, store.kept_images, store.damaged_images] if store else [0, 0, 0]
    read, kept, damaged = (int(n) for n in groups.sum_over([float(n) for n in counts]))
    line = f"{folder}: features of {read:,} images read, of {kept:,} kept"
    return line + (f"; {damaged:,} were damaged and computed anew" if damaged else "")
