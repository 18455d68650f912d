"""What one turn of an engine does, and how the ranks of a server stay alike.

    rank 0   requests -> Commands --share--> turn
    rank 1                          `------> turn      the same requests in the same order, so the same answers

With one process nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.engine import Engine, Event, Prompt
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.types import Images, UserError


@dataclass(frozen=True, kw_only=True)
class Work:
    """One request on its way to the engines. Plain data: it can travel between processes."""

    ticket: int
    tokens: tuple[int, ...]
    images: Images[NDArray[Any]] | None
    positions: NDArray[np.int64] | None
    """Of M-RoPE, see `Prompt`."""
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What the engines do in one turn."""

    add: tuple[Work, ...] = ()
    cancel: tuple[int, ...] = ()
    """Tickets."""
    stop: bool = False


Share = Callable[[Commands], Commands]
"""Called by every rank before each turn: rank 0 hands in the commands, every rank gets them back."""


def alone(commands: Commands) -> Commands:
    """The `Share` of a single process."""
    return commands


class Turns:
    """An engine under tickets: the part that is the same on every rank."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tickets: dict[int, int] = {}

    def turn(self, commands: Commands) -> list[tuple[int, Event]]:
        """Take in what is new, let go what is cancelled, one step; the events with their tickets."""
        for ticket in commands.cancel:
            for number in [number for number, known in self._tickets.items() if known == ticket]:
                self.engine.cancel(number)
                del self._tickets[number]
        refused = [(work.ticket, event) for work in commands.add if (event := self._add(work)) is not None]
        events = self.engine.step() if self.engine.running or self.engine.waiting else []
        return refused + [(self._tickets[e.request], e) for e in events if e.request in self._tickets]

    def forget(self, ticket: int) -> None:
        """All answers of this request have ended."""
        self._tickets = {number: known for number, known in self._tickets.items() if known != ticket}

    def _add(self, work: Work) -> Event | None:
        count = 0 if work.images is None else work.images.count
        prompt = Prompt(tokens=work.tokens, images=lambda: work.images, image_count=count, positions=work.positions)
        try:
            self._tickets[self.engine.add(prompt, work.params)] = work.ticket
        except UserError as error:
            return Event(
                request=-1,
                index=0,
                text="",
                token_ids=(),
                logprobs=(),
                finish_reason="error",
                stop_reason=None,
                error=str(error),
            )
        return None


def follow(engine: Engine, share: Share) -> None:
    """What the ranks other than 0 do until rank 0 stops."""
    turns, left = Turns(engine), {}
    while not (commands := share(Commands())).stop:
        left.update({work.ticket: work.params.n for work in commands.add})
        for ticket, event in turns.turn(commands):
            if event.finish_reason is not None:
                left[ticket] = 0 if event.request < 0 else left[ticket] - 1
                if not left[ticket]:
                    turns.forget(ticket)
