"""Processes that start at once: forks of one that has imported torch and megatron-core and has done nothing else.

The import takes a process five seconds, most of what a short test computes. Where CUDA is (a driver that was asked does
not survive a fork), processes start afresh. Two things differ from a fresh start: forks share a hash seed, and what is
imported here is there already. So a test (`fresh` in runs.py) or a command of .ci/run starts each verb once as a person
does, training on several ranks too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

IMPORTED = ["pytest", "vlm_nemo.verbs.train", "vlm_nemo.verbs.evaluate", "vlm_nemo.verbs.generate"]

GRACE_S = 20.0


@cache
def context() -> Any:
    """What `Process` and `SimpleQueue` are taken from."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(IMPORTED)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # it is read once, and no thread may be there when it forks
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
    return multiprocessing.get_context("forkserver")


def run_module(
    module: str, words: Sequence[str], *, folder: Path, environments: Sequence[Mapping[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python -m module words…` in that folder, once in each environment at the same time: what they said, in that
    order, and the first exit code that is not 0. When one fails the others have GRACE_S to end."""
    with tempfile.TemporaryDirectory() as said:
        files = [(Path(said, f"out{i}"), Path(said, f"err{i}")) for i in range(len(environments))]
        processes = [
            context().Process(target=_run_module, args=(module, list(words), folder, dict(environment), pair))
            for environment, pair in zip(environments, files, strict=True)
        ]
        for pair, process in zip(files, processes, strict=True):
            for file in pair:
                file.touch()
            process.start()
        deadline, failed = time.monotonic() + timeout, False
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
            if not failed and any(process.exitcode for process in processes):
                deadline, failed = time.monotonic() + GRACE_S, True
            time.sleep(0.02)
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
        for process in processes:
            process.join()
        out, errors = ("".join(file.read_text(encoding="utf-8") for file in kind) for kind in zip(*files, strict=True))
    if late and not failed:
        raise subprocess.TimeoutExpired([module, *words], timeout, out, errors)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([module, *words], code, out, errors)


def take_environment(environment: Mapping[str, str]) -> None:
    """The process that forks has that of its own start."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))


def _run_module(
    module: str, words: list[str], folder: Path, environment: dict[str, str], files: tuple[Path, Path]
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    take_environment(environment)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
