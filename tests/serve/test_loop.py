"""The engine's thread by itself, and two ranks that stay alike."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.squares import squares
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Event
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.serve.loop import EngineLoop, Full, Gone
from vlm_nemo.serve.turns import Commands, follow
from vlm_nemo.types import UserError

from .parrot import PER_IMAGE, Parrot, make_model, until

PARAMS = SamplingParams(max_tokens=8, seed=1)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event | None] = []

    def __call__(self, event: Event | None, began: float) -> None:
        self.events.append(event)

    @property
    def ended(self) -> bool:
        return any(event is None or event.finish_reason is not None for event in self.events)


def prompt(tokenizer: Tokenizer, images: int = 0) -> tuple[Any, ...]:
    tokens = (tokenizer.bos_id, *[tokenizer.image_id] * (images * PER_IMAGE), *tokenizer.encode("hello"))
    pixels = np.zeros((images, 3, 16, 16), np.uint8) if images else None
    return tokens, squares(pixels, tokens, tokenizer.image_id), None


def started(parrot: Parrot, **options: Any) -> EngineLoop:
    loop = EngineLoop(lambda: make_model(parrot), **{"max_waiting": 4, **options})
    loop.start()
    until(lambda: loop.why_not is None)
    return loop


def test_events_reach_their_listener(parrot: Parrot) -> None:
    loop = started(parrot)
    heard = [Heard() for _ in range(3)]
    for listener in heard:
        loop.submit(*prompt(parrot.tokenizer), PARAMS, listener)
    until(lambda: all(listener.ended for listener in heard))
    texts = ["".join(e.text for e in listener.events if e) for listener in heard]
    assert len(set(texts)) == 1 and texts[0]
    loop.drain(1)
    until(lambda: loop.ended)
    with pytest.raises(Gone, match="The server is stopping"):
        loop.submit(*prompt(parrot.tokenizer), PARAMS, Heard())


def test_places_are_counted(parrot: Parrot) -> None:
    loop = started(parrot, max_waiting=2)
    with loop.place(), loop.place(), pytest.raises(Full), loop.place():
        pass
    assert loop.waiting == 0
    loop.drain(0)


def test_a_cancelled_request_is_heard_no_more(parrot: Parrot) -> None:
    loop = started(parrot)
    parrot.go.clear()
    first, second = Heard(), Heard()
    running = loop.submit(*prompt(parrot.tokenizer), PARAMS, first)
    until(lambda: not loop._inbox)
    queued = loop.submit(*prompt(parrot.tokenizer), PARAMS, second)
    loop.cancel(running)
    loop.cancel(queued)
    loop.cancel(999)
    parrot.go.set()
    until(lambda: loop.running == 0 and loop.waiting == 0)
    assert first.events == second.events == []
    assert len(parrot.prompts) == 1  # the queued one never began
    loop.drain(0)


def test_what_the_engine_refuses_ends_that_request_alone(parrot: Parrot) -> None:
    loop = started(parrot)
    refused, fine = Heard(), Heard()
    loop.submit(*prompt(parrot.tokenizer), replace(PARAMS, max_tokens=10**6, n=3), refused)
    loop.submit(*prompt(parrot.tokenizer), PARAMS, fine)
    until(lambda: fine.ended and refused.ended)
    (event,) = refused.events
    assert event is not None and event.finish_reason == "error" and "maximum context length" in (event.error or "")
    loop.drain(0)


def test_a_dead_engine_tells_everybody(parrot: Parrot) -> None:
    loop = started(parrot)
    parrot.failure = RuntimeError("gone")
    heard = Heard()
    loop.submit(*prompt(parrot.tokenizer), PARAMS, heard)
    until(lambda: heard.ended)
    assert heard.events == [None] and loop.why_not == "The engine has died."
    assert str(loop.failure) == "gone"


def test_a_model_that_cannot_be_opened(parrot: Parrot) -> None:
    def refuse() -> Any:
        raise UserError("no such folder")

    ended = threading.Event()
    loop = EngineLoop(refuse, max_waiting=1, on_end=ended.set)
    assert loop.why_not == "The model is loading."
    loop.start()
    assert ended.wait(5) and isinstance(loop.failure, UserError)


# --- two ranks ----------------------------------------------------------------------------------------------------


def test_two_ranks_do_the_same(tokenizer: Tokenizer) -> None:
    """The commands go through a queue instead of a process group; both engines must run the same rows."""
    pipe: queue.Queue[Commands] = queue.Queue()

    def send(commands: Commands) -> Commands:
        pipe.put(commands)
        return commands

    def receive(commands: Commands) -> Commands:
        assert commands == Commands()
        return pipe.get(timeout=20)

    first, second = Parrot(tokenizer, slots=2), Parrot(tokenizer, slots=2)
    first.delay = 0.002
    other = threading.Thread(target=follow, args=(make_model(second).engine, receive))
    other.start()
    loop = EngineLoop(lambda: make_model(first), max_waiting=20, sharer=lambda model: send, idle_s=0.02)
    loop.start()
    until(lambda: loop.why_not is None)
    heard = [Heard() for _ in range(8)]
    tickets = []
    for number, listener in enumerate(heard):
        params = replace(PARAMS, n=1 + number % 2, temperature=float(number % 3), seed=number, max_tokens=6 + number)
        tickets.append(loop.submit(*prompt(tokenizer, number % 3), params, listener))
    loop.cancel(tickets[5])
    loop.submit(*prompt(tokenizer), replace(PARAMS, max_tokens=10**6), Heard())
    until(lambda: all(h.ended for i, h in enumerate(heard) if i != 5) and loop.running == 0)
    loop.drain(5)
    other.join(20)
    assert not other.is_alive() and loop.ended and loop.failure is None
    assert first.batches == second.batches and first.prompts == second.prompts
    for mine, theirs in zip(first.images, second.images, strict=True):
        assert np.array_equal(mine.patches, theirs.patches) if mine is not None else theirs is None
    assert len(first.batches) > 10


def test_an_idle_engine_keeps_the_others_awake(parrot: Parrot) -> None:
    shared: list[Commands] = []

    def share(commands: Commands) -> Commands:
        shared.append(commands)
        return commands

    loop = started(parrot, sharer=lambda model: share, idle_s=0.01)
    until(lambda: len(shared) > 3)
    loop.drain(0)
    until(lambda: loop.ended)
    assert shared[-1].stop and all(commands == Commands() for commands in shared[:-1])
