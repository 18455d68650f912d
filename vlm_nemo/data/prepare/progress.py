"""A progress bar with rates, and lines now and then where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 60.0
"""How often a line is written to a log file."""


class Meter:
    """Shows samples done of all, samples/s, MB/s and the time left."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        """total: samples."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._console = console
        self._what = what
        self._total = total
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self._progress.add_task(what, total=total, rate="")
        self._done = self._fresh = self._bytes = 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, samples: int, size: int, *, reused: bool = False) -> None:
        """So many samples more, of `size` bytes; reused ones do not count for the rate."""
        now = time.monotonic()
        self._done += samples
        if reused:
            self._progress.update(self._bar, completed=self._done)
            return
        self._fresh += samples
        self._bytes += size
        seconds = max(now - self._started, 1e-3)
        rate = f"{self._fresh / seconds:.0f} samples/s {self._bytes / 1e6 / seconds:.1f} MB/s"
        self._progress.update(self._bar, completed=self._done, rate=rate)
        if not self._console.is_terminal and now - self._said > LINE_SECONDS:
            self._said = now
            left = (self._total - self._done) * seconds / max(self._fresh, 1)
            self._console.print(
                f"{self._what}: {self._done} of {self._total} samples, {rate}, {left / 60:.0f} min left",
                highlight=False,
                soft_wrap=True,
            )
