"""Being asked to stop: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, at any moment; the loop asks after each step.

Slurm sends a step's signal to every process that the step has, helpers of loggers and libraries included, and the
default action of SIGUSR1 and SIGUSR2 is to kill. So a run blocks these two with its first statement (`hold`), and its
threads and children inherit that: nobody dies of one, and one that comes while torch is still being imported waits
until it is asked for.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """`name` is the signal received, or None. A second SIGINT interrupts at once, for a person who means it."""

    def __init__(self) -> None:
        self._name: str | None = None

    @property
    def name(self) -> str | None:
        if self._name is None and (waiting := signal.sigpending() & set(HELD)):
            self._name = signal.Signals(min(waiting)).name
        return self._name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name


def hold() -> None:
    """Keep SIGUSR1 and SIGUSR2 waiting, in this thread and in what it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the signals by which a person, a launcher or Slurm ends a job, and put everything back after."""
    request = StopRequest()
    # The held two as well: a thread from before `hold` would receive one, and die of it.
    caught = (signal.SIGINT, signal.SIGTERM, *HELD)
    before = {number: signal.signal(number, request._handle) for number in caught}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # one that waits goes to our handler, not to the old one
        for number, handler in before.items():
            signal.signal(number, handler)
