"""From shards to packed batches: a thread plans and decodes ahead, next() hands out one optimizer step.

order -> record -> tokens -> row (planner.py, the same on every rank)
                              -> this rank's rows -> decoded images -> PackedBatch -> queue -> next()
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_nemo.data.cache import Cache
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.folders import open_folder
from vlm_nemo.data.image import decode_images
from vlm_nemo.data.layout import ImageSpec
from vlm_nemo.data.mixture import Mixture
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.planner import Plan, PlannedSample, Planner
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import Drop, EncodedSample, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import PackedBatch, UserError

_PATIENCE = 1.0
"""Seconds between two looks at whether the thread is alive."""


@dataclass(kw_only=True)
class StepData:
    """One optimizer step of data, as one rank gets it."""

    batches: list[PackedBatch]
    """This rank's rows."""
    keys: list[list[int]]
    """Positions in the global order of the samples of each row: their identity, for tests and logs."""
    state: dict[str, Any]
    """What a Loader needs to go on after this step; JSON-able, the same on every rank."""
    planned_drops: list[Drop]
    """Found by the plan: the same on every rank."""
    local_drops: list[Drop]
    """Found while decoding this rank's images: to be gathered over the data-parallel ranks."""
    seen: int
    """Samples that this step accounts for, over all ranks: used + len(planned_drops)."""
    used: int
    """Samples that were given a place in a row, over all ranks; those of all ranks' local_drops are among them."""


class Loader:
    """This rank's share of every step, for ever (an epoch's end is only another permutation)."""

    wait_s: float
    """Seconds that the last next() had to wait."""

    def __init__(
        self,
        cfg: DataConfig,
        spec: ImageSpec,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_tokens: int,
        dp_rank: int,
        dp_size: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """max_tokens: longest sample that the model takes; state: of a StepData, taken at any dp_size.

        Raises UserError for a folder without shards, an unknown template, rows that cannot be shared out, a state
        of another data set.
        """
        if cfg.template not in TEMPLATES:
            raise UserError(f"data.template={cfg.template} is unknown; choose one of {', '.join(TEMPLATES)}")
        if cfg.global_packs < 1 or cfg.global_packs % dp_size:
            raise UserError(
                f"data.global_packs={cfg.global_packs} rows cannot be shared out to {dp_size} data-parallel ranks; "
                f"make it a multiple of {dp_size}"
            )
        for name, value in (("pack.pool", cfg.pack.pool), ("threads", cfg.threads), ("prefetch", cfg.prefetch)):
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1")
        weights = {name: source.weight for name, source in cfg.sources.items()}
        cache = Cache(cfg.store)
        folders = {
            name: open_folder(source.path, f"data.sources.{name}.path", cache=cache)
            for name, source in cfg.sources.items()
            if source.weight > 0
        }
        records = {name: len(folder) for name, folder in folders.items()}
        order = {
            "seed": seed,
            "shuffle": cfg.shuffle,
            "sources": {name: [n, weights[name]] for name, n in records.items()},
        }
        self._cfg = cfg
        self._spec = spec
        self._pad_id = tokenizer.pad_id
        self._rows = range(dp_rank, cfg.global_packs, dp_size)
        self._folders = folders
        self._planner = Planner(
            folders,
            Mixture(records, weights, seed=seed, shuffle=cfg.shuffle),
            tokenizer,
            TEMPLATES[cfg.template],
            spec,
            capacity=cfg.pack.capacity,
            pool=cfg.pack.pool,
            max_tokens=max_tokens,
            order=order,
        )
        if state is not None:
            self._planner.load(state)
        self.wait_s = 0.0
        self._queue: queue.Queue[StepData | BaseException] = queue.Queue(maxsize=cfg.prefetch)
        self._failed: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="vlm_nemo.data", daemon=True)
        self._thread.start()

    def next(self) -> StepData:
        """The next step. Raises what went wrong in the thread; never waits for a thread that is gone."""
        if self._failed is not None:
            raise self._failed
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        started = time.perf_counter()
        while True:
            try:
                found = self._queue.get(timeout=_PATIENCE)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    found = RuntimeError("the data thread is gone")
                    break
        self.wait_s = time.perf_counter() - started
        if isinstance(found, BaseException):
            self._failed = found
            raise found
        return found

    def close(self) -> None:
        """Stop the thread; a second call does nothing."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # the thread may wait for room
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _produce(self) -> None:
        try:
            with ThreadPoolExecutor(self._cfg.threads, thread_name_prefix="vlm_nemo.decode") as threads:
                while not self._stop.is_set():
                    self._put(self._build(self._planner.step(self._cfg.global_packs), threads))
        except BaseException as error:  # handed to the caller of next(), who would wait for ever otherwise
            self._put(error)

    def _put(self, item: StepData | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue

    def _build(self, plan: Plan, threads: ThreadPoolExecutor) -> StepData:
        """Decode and pack this rank's rows of a plan."""
        rows = [plan.rows[j] for j in self._rows]
        # All rows' images are under way at once, so that no thread waits at a row's end
        decoded = iter(list(threads.map(self._images, [sample for row in rows for sample in row])))
        batches, keys, drops = [], [], []
        for row in rows:
            kept, names = [], []
            for sample in row:
                images = next(decoded)
                if isinstance(images, SampleError):
                    key = self._planner.name(sample.source, sample.record)
                    drops.append(Drop(sample.source, images.reason, key))
                else:
                    kept.append(EncodedSample(tokens=sample.tokens, labels=sample.labels, images=images))
                    names.append(sample.position)
            batches.append(pack_batch(kept, self._cfg.pack.capacity, self._pad_id, self._spec.size))
            keys.append(names)
        return StepData(
            batches=batches,
            keys=keys,
            state=plan.state,
            planned_drops=plan.drops,
            local_drops=drops,
            seen=plan.samples + len(plan.drops),
            used=plan.samples,
        )

    def _images(self, sample: PlannedSample) -> Tensor | SampleError:
        """[n, 3, S, S] uint8, or why there are none."""
        encoded = list(self._folders[sample.source].images(sample.record)) if sample.images else []
        try:
            return torch.from_numpy(decode_images(encoded, self._spec, torch_resize))
        except SampleError as error:
            return error
