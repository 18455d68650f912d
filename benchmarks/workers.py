"""Sides of a comparison that keep their state: each in a process of its own, told when to take how many steps.

A process that starts takes seconds; one that stays does not count them. What its threads do between two turns counts
into the next one, so whatever is prepared ahead is paid for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from benchmarks.report import HERE

Told = dict[str, float]
"""What a turn's steps went through, and "seconds" of CPU."""


class Here:
    """A side in this process, for --quick."""

    def __init__(self, loop: Generator[Any]) -> None:
        self.loop, self.seen = loop, list[Told]()

    def steps(self, count: int) -> float:
        """CPU seconds a sample, with what other sides' threads did meanwhile."""
        self.seen.append(turn(self.loop, count, time.process_time()))
        return self.seen[-1]["seconds"] / self.seen[-1]["samples"]

    def close(self) -> None:
        self.loop.close()


class Worker:
    """A side in its own process, which runs `serve`."""

    def __init__(self, module: str, words: Sequence[str]) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=HERE.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: list[Told] = []

    def steps(self, count: int) -> float:
        """CPU seconds a sample."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side ended with {self.process.wait()}")
        self.seen.append(json.loads(line))
        return self.seen[-1]["seconds"] / self.seen[-1]["samples"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(start: Callable[[], Generator[Any]]) -> None:
    """Be a Worker's process: a line of standard input is a number of steps to take."""
    import torch

    torch.set_num_threads(1)
    loop, marked = start(), 0.0
    for line in sys.stdin:
        told = turn(loop, int(line), marked)
        marked += told["seconds"]
        print(json.dumps(told), flush=True)
    loop.close()


def turn(loop: Generator[Any], count: int, since: float) -> Told:
    """Take so many steps; CPU seconds of this process since that moment of it."""
    done = [next(loop) for _ in range(count)]
    sums = {name: sum(getattr(one, name) for one in done) for name in ("samples", "tokens", "places")}
    return {"seconds": time.process_time() - since, **sums}


def fill(seen: Sequence[Told]) -> float:
    """Tokens over places of these turns."""
    return sum(told["tokens"] for told in seen) / sum(told["places"] for told in seen)
