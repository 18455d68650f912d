"""Run a function on several gloo processes: `run_ranks(check, 2)`. What a rank raises fails the test, with its name."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests import warm


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call function(*args) on `world` new processes with torchrun's variables set; return what each returned.

    function must be importable (a module-level function), its arguments and result picklable.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = warm.context()
    results: Any = context.SimpleQueue()
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    processes = [
        context.Process(target=_entry, args=(function, args, environment, results), daemon=True)
        for environment in environments
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__}: ranks {sorted(set(range(world)) - set(found))} still run")
            if results.empty():
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in found]
                if dead and results.empty():
                    raise RuntimeError(f"{function.__name__}: rank {dead[0]} died with {processes[dead[0]].exitcode}")
                time.sleep(0.02)
                continue
            rank, ok, value = results.get()
            if not ok:
                raise AssertionError(f"rank {rank} of {function.__name__} failed:\n{value}")
            found[rank] = value
    finally:
        for process in processes:
            if len(found) < world:
                process.kill()
            process.join(10)
    return [found[rank] for rank in range(world)]


def _entry(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], results: Any) -> None:
    warm.take_environment(environment)
    rank = int(environment["RANK"])
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
