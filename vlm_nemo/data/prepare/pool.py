"""Processes for prepare: started only when there is enough to do, gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from typing import TypeVar

PARALLEL_SAMPLES = 2000
"""Below this, starting processes costs more than it saves."""
PARALLEL_FILES = 16
"""Likewise, for files to be looked through."""

Given = TypeVar("Given")
Made = TypeVar("Made")


class Pool:
    """Runs a function on many things, here or in several processes."""

    def __init__(self, workers: int, stack: ExitStack) -> None:
        """stack: closes the processes."""
        self._workers = workers
        self._stack = stack
        self._executor: Executor | None = None

    def _start(self) -> Executor:
        if self._executor is None:
            # spawn: the parent has threads (progress bar, tokenizers), and forking with threads may deadlock
            context = multiprocessing.get_context("spawn")
            executor = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_follow_parent)
            self._stack.callback(executor.shutdown, cancel_futures=True)
            self._executor = executor
        return self._executor

    def run(self, function: Callable[[Given], Made], tasks: Iterable[Given], samples: int) -> Iterator[Made]:
        """Results in any order. samples: how many there are in all, which decides where the work is done."""
        if self._workers == 1 or samples < PARALLEL_SAMPLES:
            yield from map(function, tasks)
            return
        executor = self._start()
        waiting: set[Future[Made]] = set()
        for task in tasks:
            if len(waiting) >= 2 * self._workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            waiting.add(executor.submit(function, task))
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def map(self, function: Callable[[Given], Made], files: Sequence[Given]) -> Iterator[Made]:
        """Results in order, for many files."""
        if self._workers == 1 or len(files) < PARALLEL_FILES:
            return map(function, files)
        return self._start().map(function, files, chunksize=max(1, len(files) // (8 * self._workers)))


def _follow_parent() -> None:
    """End with the parent: one that was killed leaves nobody behind who would go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
