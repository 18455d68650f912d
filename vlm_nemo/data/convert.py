"""Convert units of raw samples to shards, here or in several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw import RawDrop, Unit
from vlm_nemo.data.shards import index_path
from vlm_nemo.data.write import ShardSample, write_shard

PARALLEL_SAMPLES = 2000
"""Below this, starting processes costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process needs to write one shard."""

    number: int
    tar: Path
    unit: Unit
    before: dict[str, Any] | None
    """The shard's entry in the manifest of an earlier run."""


def convert(task: Task) -> tuple[int, dict[str, Any]]:
    """Write one shard, unless it was written from the same input already; returns its number and manifest entry."""
    fingerprint = task.unit.fingerprint()
    if task.before is not None and _still_there(task.tar, task.before, fingerprint):
        return task.number, {**task.before, "reused": True}
    drops: list[RawDrop] = []
    counts: Counter[str] = Counter()

    def samples() -> Iterator[ShardSample]:
        for i, raw in enumerate(task.unit.read()):
            if isinstance(raw, RawDrop):
                drops.append(raw)
            else:
                counts["records"] += 1
                counts["images"] += len(raw.images)
                yield ShardSample(
                    key=f"{task.number:05d}{i:06d}",
                    messages=raw.messages,
                    kind=raw.kind,
                    source_id=raw.name,
                    images=raw.images,
                )

    task.tar.parent.mkdir(parents=True, exist_ok=True)
    write_shard(task.tar, samples())
    entry = {
        "name": task.tar.name,
        "records": counts["records"],
        "images": counts["images"],
        "bytes": task.tar.stat().st_size,
        "sha256": _sha256(task.tar),
        "index_sha256": _sha256(index_path(task.tar)),
        "input": fingerprint,
        "dropped": [list(drop) for drop in drops],
    }
    return task.number, entry


def _still_there(tar: Path, entry: dict[str, Any], fingerprint: str) -> bool:
    return (
        entry.get("input") == fingerprint
        and tar.is_file()
        and tar.stat().st_size == entry.get("bytes")
        and index_path(tar).is_file()
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Pool:
    """Processes that start only when there is enough to do."""

    def __init__(self, workers: int, stack: ExitStack) -> None:
        self._workers = workers
        self._stack = stack
        self._executor: Executor | None = None

    def executor(self, samples: int) -> Executor | None:
        """None: do it here."""
        if self._workers > 1 and samples >= PARALLEL_SAMPLES and self._executor is None:
            context = multiprocessing.get_context("spawn")
            executor = ProcessPoolExecutor(self._workers, mp_context=context)
            self._stack.callback(executor.shutdown, cancel_futures=True)
            self._executor = executor
        return self._executor if samples >= PARALLEL_SAMPLES else None

    def run(self, tasks: list[Task], samples: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number of the shard, its entry), in any order."""
        executor = self.executor(samples)
        if executor is None:
            for task in tasks:
                yield convert(task)
            return
        waiting: set[Future[tuple[int, dict[str, Any]]]] = set()
        for task in tasks:
            if len(waiting) >= 2 * self._workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            waiting.add(executor.submit(convert, task))
        for future in waiting:
            yield future.result()
