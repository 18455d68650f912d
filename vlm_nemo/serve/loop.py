"""The engine's thread: one thread owns the engine; requests come in, events go out.

asyncio          submit, cancel                                   listeners
                       |                                              ^
engine's thread     commands -> (shared with other ranks) -> turn -> events
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.engine import Event
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.serve.turns import Commands, Share, Turns, Work, alone
from vlm_nemo.types import Images, UserError

if TYPE_CHECKING:
    from vlm_nemo.infer.load import LoadedModel

logger = logging.getLogger(__name__)

Listener = Callable[[Event | None, float], None]
"""Gets each event of a request, and when the turn that made it began (time.monotonic); None = no more will come."""

Delivery = tuple[Listener, Event | None, float]

Post = Callable[[Sequence[Delivery]], None]
"""Takes the events of a turn to where the listeners live."""


class Full(Exception):
    """The waiting queue is full; holds how many wait."""


class Gone(Exception):
    """The engine takes no requests: loading, stopping or dead. Its text says which."""


def deliver(deliveries: Sequence[Delivery]) -> None:
    """The `Post` that calls the listeners where it is called."""
    for listener, event, began in deliveries:
        listener(event, began)


@dataclass(kw_only=True)
class _Open:
    """A request whose answers have not all ended."""

    listener: Listener
    left: int
    """Answers to come."""


class EngineLoop:
    """Rank 0's engine thread. Its methods may be called from any thread."""

    def __init__(
        self,
        open_model: Callable[[], LoadedModel],
        *,
        max_waiting: int,
        sharer: Callable[[LoadedModel], Share] = lambda model: alone,
        on_ready: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        idle_s: float = 5.0,
    ) -> None:
        """open_model: runs in the thread. sharer: how the model's ranks share commands.

        on_ready, on_end: called in the thread, when requests may come and when none may any more.
        idle_s: an idle engine shares empty commands that often, so that no rank's wait times out.
        """
        self._open_model = open_model
        self._max_waiting = max_waiting
        self._sharer = sharer
        self._on_ready, self._on_end = on_ready, on_end
        self._idle_s = idle_s
        self._post: Post = deliver
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._inbox: list[Work] = []
        self._cancelled: list[int] = []
        self._open: dict[int, _Open] = {}
        self._tickets = 0
        self._places = 0
        self._deadline: float | None = None
        self._engine_waiting = 0
        self.model: LoadedModel | None = None
        self.failure: BaseException | None = None
        self.ended = False
        self.running = 0
        """Answers being decoded, at the end of the last turn."""
        self.cache_usage = 0.0
        """Share of the KV cache in use, at the end of the last turn."""

    def start(self, post: Post = deliver) -> None:
        """Load the model and take requests. post: how events leave the thread."""
        self._post = post
        self._thread.start()

    @property
    def why_not(self) -> str | None:
        """Why no request is taken now; None = they are."""
        if self.failure is not None or (self.model is not None and not self._thread.is_alive() and not self.stopping):
            return "The engine has died."
        if self.stopping or self.ended:
            return "The server is stopping."
        return "The model is loading." if self.model is None else None

    @property
    def stopping(self) -> bool:
        return self._deadline is not None

    @property
    def waiting(self) -> int:
        """Requests that were let in and have not begun."""
        return self._places + len(self._inbox) + self._engine_waiting

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the waiting queue for a request that is still being read. Raises Full, Gone."""
        with self._wake:
            if (reason := self.why_not) is not None:
                raise Gone(reason)
            if self.waiting >= self._max_waiting:
                raise Full(self.waiting)
            self._places += 1
        try:
            yield
        finally:
            with self._wake:
                self._places -= 1

    def submit(
        self,
        tokens: tuple[int, ...],
        images: Images[NDArray[Any]] | None,
        positions: NDArray[np.int64] | None,
        params: SamplingParams,
        listener: Listener,
    ) -> int:
        """Queue a request; its ticket. The listener hears of it until all n answers have ended. Raises Gone."""
        with self._wake:
            if (reason := self.why_not) is not None:
                raise Gone(reason)
            self._tickets += 1
            self._open[self._tickets] = _Open(listener=listener, left=params.n)
            self._inbox.append(
                Work(ticket=self._tickets, tokens=tokens, images=images, positions=positions, params=params)
            )
            self._wake.notify()
            return self._tickets

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this request any more; its listener hears nothing further."""
        with self._wake:
            if self._open.pop(ticket, None) is None:
                return
            before = len(self._inbox)
            self._inbox = [work for work in self._inbox if work.ticket != ticket]
            if len(self._inbox) == before:
                self._cancelled.append(ticket)
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Take nothing new; end when all answers have ended, at the latest after that many seconds."""
        with self._wake:
            deadline = time.monotonic() + seconds
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._wake.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _main(self) -> None:
        try:
            model = self._open_model()
            share = self._sharer(model)
            with self._wake:
                self.model = model
            self._on_ready()
            turns = Turns(model.engine)
            while not (commands := share(self._next())).stop:
                self._turn(turns, commands)
        except BaseException as error:
            self.failure = error
            if not isinstance(error, UserError):
                logger.exception("the engine has died")
        finally:
            with self._wake:
                self.ended = True
                self.running = self._engine_waiting = 0
                self._inbox.clear()
                open_, self._open = self._open, {}
            self._post([(request.listener, None, time.monotonic()) for request in open_.values()])
            self._on_end()

    def _next(self) -> Commands:
        """What to do now; waits while there is nothing."""
        with self._wake:
            now = time.monotonic()
            until = min(now + self._idle_s, self._deadline or float("inf"))
            while not (self._inbox or self._cancelled or self._open or self.stopping) and now < until:
                self._wake.wait(until - now)
                now = time.monotonic()
            if self._deadline is not None and (now >= self._deadline or not self._open):
                return Commands(stop=True)
            commands = Commands(add=tuple(self._inbox), cancel=tuple(self._cancelled))
            # Until the turn's end they count as waiting in the engine
            self._engine_waiting += len(self._inbox)
            self._inbox, self._cancelled = [], []
            return commands

    def _turn(self, turns: Turns, commands: Commands) -> None:
        began = time.monotonic()
        events = turns.turn(commands)
        deliveries: list[Delivery] = []
        with self._wake:
            for ticket, event in events:
                request = self._open.get(ticket)
                if request is None:
                    continue
                deliveries.append((request.listener, event, began))
                if event.finish_reason is not None:
                    request.left = 0 if event.request < 0 else request.left - 1
                    if request.left == 0:
                        del self._open[ticket]
                        turns.forget(ticket)
            self.running, self._engine_waiting = turns.engine.running, turns.engine.waiting
            self.cache_usage = turns.engine.cache_usage
        if deliveries:
            self._post(deliveries)
