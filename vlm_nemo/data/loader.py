"""From folders to packed batches: a thread plans and decodes ahead, next() hands out one optimizer step.

order -> lengths -> rows of the step (planner.py, the same on every replica)
                    -> shared out so that replicas carry equal vision work
                    -> this replica's rows -> records, images -> PackedBatch -> queue -> next()
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from vlm_nemo.data.augment import check_augment
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.encode import PlannedSample
from vlm_nemo.data.features import FeatureStore, known_features
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.ledger import check_budget, recent_samples
from vlm_nemo.data.mixture import drawn
from vlm_nemo.data.packing import pack_batch, share_out
from vlm_nemo.data.planner import Plan
from vlm_nemo.data.sample import Drop, EncodedSample, SampleError
from vlm_nemo.data.sources import open_sources
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import PackedBatch, UserError

log = logging.getLogger(__name__)

LOOKED_AT = 2048
"""Lengths by which a run's packing is judged when it starts."""
_PATIENCE = 1.0
"""Seconds between two looks at whether the thread is alive."""
_Read = Callable[[Iterable[PlannedSample]], Iterable[EncodedSample | SampleError]]


@dataclass(kw_only=True)
class StepData:
    """One optimizer step of data, as one replica gets it."""

    batches: list[PackedBatch]
    """This replica's micro-batches, data.micro_packs rows each."""
    rows: list[list[int]]
    """Which of the step's rows are in each."""
    keys: list[list[int]]
    """Positions in the global order of the samples of each: their identity, for tests and logs."""
    state: dict[str, Any]
    """What a Loader needs to go on after this step; JSON-able, the same on every rank."""
    planned_drops: list[Drop]
    """Found by the plan: the same on every rank, but only the first replica has their names."""
    local_drops: list[Drop]
    """Found while reading this replica's rows: to be gathered over the data-parallel ranks."""
    seen: int
    """Samples that this step accounts for, over all ranks: those of `used` + len(planned_drops)."""
    used: dict[str, int]
    """Samples that were given a place in a row, over all ranks, by source; all ranks' local_drops are among them."""
    delay: int
    """The longest that a sample of the step waited for its row, samples drawn after it."""
    vision_balance: float
    """The largest share of the step's vision work over the mean, over the replicas; 1 = all equal."""


class Loader:
    """This replica's share of every step, for ever (an epoch's end is only another permutation)."""

    wait_s: float
    """Seconds that the last next() had to wait."""
    cycle: int | None
    """Samples in one cycle of the blend; None where sources take turns by weight."""
    first_lengths: list[int]
    """Tokens of the first LOOKED_AT samples of the order, 0 for one that cannot be used; on the first replica only, and
    only if every source has lengths."""

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
        features: FeatureStore | None = None,
    ) -> None:
        """max_tokens: longest sample that the model takes; state: of a StepData, taken at any dp_size; features: what
        the vision tower made of images before, opened by then or later.

        Raises UserError for a folder without shards, an unknown template, rows that cannot be shared out, a state
        of another data set.
        """
        _check(cfg, dp_size)
        self._stop = threading.Event()
        sources = open_sources(cfg, spec, tokenizer, seed=seed, stop=self._stop)
        self._cfg = cfg
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._encoder = replace(sources.encoder, features=features)
        self._planner = sources.planner(
            max_tokens,
            names=dp_rank == 0,  # the replica of the one rank that tells them
            patience={
                name: recent_samples(cfg.min_samples_before_stop)
                for name in drawn(cfg.sources)
                if _limit(cfg, name) < 1
            },
        )
        if dp_rank == 0:
            for name in self._planner.unmeasured:
                log.warning(
                    "source %s has no lengths for this tokenizer and template, so its records are read while rows are "
                    "planned; `vlm-nemo prepare MANIFEST out=DIR tokenizer=%s template=%s` prepares them",
                    name,
                    tokenizer.folder,
                    cfg.template,
                )
        # Before the thread, which looks at the same indexes
        self.cycle = sources.mixture.cycle
        self.first_lengths = self._planner.lengths(LOOKED_AT) if dp_rank == 0 else []
        if state is not None:
            self._planner.load(state)
        self.wait_s = 0.0
        self._queue: queue.Queue[StepData | BaseException] = queue.Queue(maxsize=cfg.prefetch)
        self._failed: BaseException | None = None
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
        """Stop the thread, and what it reads from a remote store; a second call does nothing."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # the thread may wait for room
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _produce(self) -> None:
        try:
            with ExitStack() as stack:
                read: _Read = lambda samples: map(self._read, samples)  # noqa: E731
                if self._cfg.threads:
                    threads = ThreadPoolExecutor(self._cfg.threads, thread_name_prefix="vlm_nemo.decode")
                    stack.callback(threads.shutdown, cancel_futures=True)
                    read = lambda samples: threads.map(self._read, samples)  # noqa: E731
                if self._encoder.features is not None:
                    self._encoder.features.wait(self._stop)
                while not self._stop.is_set():
                    self._put(self._build(self._planner.step(self._cfg.global_packs), read))
        except BaseException as error:  # handed to the caller of next(), who would wait for ever otherwise
            self._put(error)

    def _put(self, item: StepData | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue

    def _build(self, plan: Plan, read: _Read) -> StepData:
        """Read and pack this replica's rows of a plan."""
        costs = plan.costs
        shares = share_out(costs, self._dp_size)
        mine = shares[self._dp_rank]
        micro = share_out([costs[i] for i in mine], len(mine) // self._cfg.micro_packs)
        rows = [[mine[i] for i in batch] for batch in micro]
        planned = [[sample for i in batch for sample in plan.rows[i]] for batch in rows]
        # All rows' samples are under way at once, so that no thread waits at a row's end
        found = iter(read([sample for batch in planned for sample in batch]))
        batches, keys, drops = [], [], []
        for batch in planned:
            kept, names = [], []
            for sample in batch:
                encoded = next(found)
                if isinstance(encoded, SampleError):
                    key = self._encoder.name(sample.source, sample.record)
                    drops.append(Drop(sample.source, encoded.reason, key))
                else:
                    kept.append(encoded)
                    names.append(sample.position)
            batches.append(self._pack(kept))
            keys.append(names)
        used = plan.used
        loads = [sum(costs[i] for i in share) for share in shares]
        return StepData(
            batches=batches,
            rows=rows,
            keys=keys,
            state=plan.state,
            planned_drops=plan.drops,
            local_drops=drops,
            seen=sum(used.values()) + len(plan.drops),
            used=used,
            delay=plan.delay,
            vision_balance=max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0,
        )

    def _pack(self, samples: list[EncodedSample]) -> PackedBatch:
        """A micro-batch with the images' features if all of them are known, else with all patches: so the tower always
        sees what it would see without the store."""
        capacity, encoder, known = self._cfg.pack.capacity * self._cfg.micro_packs, self._encoder, None
        if encoder.features is not None:
            known = known_features(encoder.features, samples, encoder.spec)
        if known is None:
            samples = [one if one.decode is None else replace(one, images=one.decode()) for one in samples]
        else:  # some may have been decoded before the others' features came
            samples = [replace(one, images=replace(one.images, patches=one.images.patches[:0])) for one in samples]
        batch = pack_batch(samples, capacity, encoder.tokenizer.pad_id, encoder.spec.patch)
        if known is not None:
            return replace(batch, features=known)
        return replace(batch, image_keys=tuple(key for sample in samples for key in sample.image_keys))

    def _read(self, sample: PlannedSample) -> EncodedSample | SampleError:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        try:
            return self._encoder.sample(sample)
        except SampleError as error:
            return error


def _limit(cfg: DataConfig, source: str) -> float:
    own = cfg.sources[source].max_bad_fraction
    return cfg.max_bad_fraction if own is None else own


def _check(cfg: DataConfig, dp_size: int) -> None:
    """Raises UserError for numbers that cannot work."""
    check_budget("data", cfg.max_bad_fraction, cfg.min_samples_before_stop)
    for name, source in cfg.sources.items():
        if source.max_bad_fraction is not None:
            check_budget(f"data.sources.{name}", source.max_bad_fraction)
    least = {"pack.capacity": 1, "pack.pool": 1, "threads": 0, "prefetch": 1, "micro_packs": 1}
    values = {"pack.capacity": cfg.pack.capacity, "pack.pool": cfg.pack.pool, "threads": cfg.threads}
    values |= {"prefetch": cfg.prefetch, "micro_packs": cfg.micro_packs}
    if cfg.pack.vision_capacity is not None:
        least["pack.vision_capacity"], values["pack.vision_capacity"] = 1, cfg.pack.vision_capacity
    for name, value in values.items():
        if value < least[name]:
            raise UserError(f"data.{name}={value} must be at least {least[name]}")
    if cfg.global_packs < 1 or cfg.global_packs % (dp_size * cfg.micro_packs):
        raise UserError(
            f"data.global_packs={cfg.global_packs} rows cannot be shared out to {dp_size} data-parallel ranks in "
            f"micro-batches of {cfg.micro_packs}; make it a multiple of {dp_size * cfg.micro_packs}"
        )
    check_augment(cfg.augment)
