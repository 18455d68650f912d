"""Run a function on several processes of this machine: `run_ranks(check, 2)`. What a rank raises, the caller sees."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.multiprocessing as mp

from vlm_nemo.runtime.local import free_port

CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of ranks that compute on the CPU, over gloo, although the machine has a GPU."""


class RankFailed(RuntimeError):
    """A rank raised, died, or did not end in time; the message has its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
    context: Any = None,
) -> list[Any]:
    """Call function(*args) on `world` new processes with torchrun's variables set; return what each returned.

    function must be importable (a module-level function), its arguments and result picklable. environment: variables
    that the processes find from their first line on. context: of multiprocessing; None = fresh interpreters.
    Raises RankFailed.
    """
    context = context or mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    common = {**os.environ, **(environment or {}), "WORLD_SIZE": str(world)}
    common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [
        context.Process(
            target=_entry,
            args=(function, args, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, results),
            daemon=True,
        )
        for rank in range(world)
    ]
    with _set(environment or {}):
        for process in processes:
            process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world:
            if time.monotonic() > deadline:
                raise RankFailed(f"{function.__name__}: ranks {sorted(set(range(world)) - set(found))} still run")
            if results.empty():
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in found]
                if dead and results.empty():
                    raise RankFailed(f"{function.__name__}: rank {dead[0]} died with {processes[dead[0]].exitcode}")
                time.sleep(0.02)
                continue
            rank, ok, value = results.get()
            if not ok:
                raise RankFailed(f"rank {rank} of {function.__name__} failed:\n{value}")
            found[rank] = value
    finally:
        for process in processes:
            if len(found) < world:
                process.kill()
            process.join(10)
    return [found[rank] for rank in range(world)]


@contextlib.contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that start inside; a process inherits them before it runs anything."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _entry(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], results: Any) -> None:
    os.environ.clear()  # a process that forks others has what it was started with
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    rank = int(environment["RANK"])
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
