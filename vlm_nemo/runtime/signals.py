"""Being asked to stop: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 set a flag that the loop reads after each step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`name` is the signal received, or None. A second SIGINT interrupts at once, for a person who means it."""

    def __init__(self) -> None:
        self.name: str | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the signals by which a person, a launcher or Slurm ends a job, and put the old handlers back after."""
    request = StopRequest()
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, request._handle) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
