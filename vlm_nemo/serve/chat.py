"""One chat request, from its body to its answer: whole or as server-sent events.

a place in the queue, else 429 -> body, bounded -> prepare (a thread) -> engine's thread -> events -> answer
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from vlm_nemo.infer.engine import Event
from vlm_nemo.serve import errors, schema
from vlm_nemo.serve.answers import DONE, Answers, TokenTexts, sse
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.errors import APIError
from vlm_nemo.serve.loop import EngineLoop, Full, Gone
from vlm_nemo.serve.metrics import Metrics, RequestTimer
from vlm_nemo.serve.prompt import Prepared, prepare

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""For the log: nobody reads this answer."""


class Service:
    """What the routes share."""

    def __init__(self, loop: EngineLoop, cfg: ServeConfig) -> None:
        self.loop = loop
        self.cfg = cfg
        self.started = int(time.time())
        self.threads = ThreadPoolExecutor(cfg.decode_threads, thread_name_prefix="decode")
        self._metrics: Metrics | None = None
        self._texts: TokenTexts | None = None

    @property
    def name(self) -> str:
        """The model's name. Raises APIError (503) while it is not known."""
        if self.cfg.name is not None:
            return self.cfg.name
        if self.loop.model is None:
            raise errors.unavailable("The model is loading.")
        return self.loop.model.name

    @property
    def metrics(self) -> Metrics:
        """Made when the model's name is known. Raises APIError (503) before."""
        if self._metrics is None:
            self._metrics = Metrics(
                self.name,
                running=lambda: self.loop.running,
                waiting=lambda: self.loop.waiting,
                cache=lambda: self.loop.cache_usage,
            )
        return self._metrics

    @property
    def texts(self) -> TokenTexts:
        """What single tokens say."""
        assert self.loop.model is not None
        if self._texts is None:
            self._texts = TokenTexts(self.loop.model.tokenizer)
        return self._texts

    async def read(self, request: Request) -> tuple[schema.ChatRequest, Prepared]:
        """The request's body, prepared for the engine. Raises APIError (400, 404, 408, 413)."""
        body = await read_body(request, self.cfg)
        model, name = self.loop.model, self.name
        assert model is not None  # a place is only given once it is loaded

        def work() -> tuple[schema.ChatRequest, Prepared]:
            asked = schema.parse(body)
            return asked, prepare(asked, model, name, self.cfg)

        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


class Conversation:
    """One request at the engine: its events, until the last or until nobody listens any more."""

    def __init__(self, service: Service, prepared: Prepared, arrived: float) -> None:
        """Raises Gone."""
        self._loop = service.loop
        self._metrics = service.metrics
        self._timer = RequestTimer(self._metrics, arrived)
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._left = n = prepared.params.n
        self._closed = False
        self._ticket = self._loop.submit(
            prepared.tokens, prepared.images, prepared.positions, prepared.params, self._listen
        )
        self._timer.accepted(prompt_tokens=len(prepared.tokens), n=n, max_tokens=prepared.params.max_tokens)

    def _listen(self, event: Event | None, began: float) -> None:
        if event is not None:
            self._timer.saw(event, began)
        self._queue.put_nowait(event)

    async def next(self) -> Event:
        """The next event. Raises APIError where the engine refused (400), could not (500) or is gone (500, 503)."""
        event = await self._queue.get()
        if event is not None and event.finish_reason is not None:
            self._left -= 1
        if event is None or event.finish_reason == "cancelled":
            raise errors.unavailable("The server is stopping.") if self._loop.stopping else errors.internal()
        if event.finish_reason == "error":
            logger.error("a request ended with an error: %s", event.error)
            # What a client can do wrong has been looked for; the engine refuses before it gives a number
            raise errors.bad_request(event.error or "refused") if event.request < 0 else errors.internal()
        return event

    async def next_unless(self, gone: asyncio.Future[None]) -> Event:
        """The next event. Raises ClientGone when `gone` is done first, and as `next` does."""
        following = asyncio.ensure_future(self.next())
        both: set[asyncio.Future[Any]] = {following, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            raise ClientGone
        return following.result()

    def close(self) -> None:
        """Whatever still runs for it is cancelled. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._left:
            self._loop.cancel(self._ticket)
            for _ in range(self._left):
                self._metrics.ended("abort")
        self._timer.ended()


class ClientGone(Exception):
    """The client hung up before its answer was there."""


class EventStream(StreamingResponse):
    """Server-sent events that end their conversation however they end, also when the client hangs up."""

    def __init__(self, conversation: Conversation, events: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._conversation = conversation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._conversation.close()


async def answer_chat(service: Service, request: Request) -> Response:
    """POST /v1/chat/completions. Raises APIError."""
    arrived = time.monotonic()
    # A page of another site can send anything else without asking the browser first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise errors.wrong_media_type()
    try:
        with service.loop.place():
            asked, prepared = await service.read(request)
        conversation = Conversation(service, prepared, arrived)
    except Full as full:
        raise errors.busy(int(str(full))) from None
    except Gone as gone:
        raise errors.unavailable(str(gone)) from None
    hung_up = asyncio.ensure_future(_hung_up(request))
    streaming = False
    try:
        answers = Answers(service.name, prepared, service.texts)
        # Also of a stream: what the engine refuses at once still gets its status
        first = await conversation.next_unless(hung_up)
        if asked.stream:
            streaming = True
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return EventStream(conversation, _events(conversation, answers, first, usage))
        answers.add(first)
        while not answers.complete:
            answers.add(await conversation.next_unless(hung_up))
        return JSONResponse(answers.whole())
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        hung_up.cancel()
        if not streaming:
            conversation.close()


async def _events(conversation: Conversation, answers: Answers, first: Event, usage: bool) -> AsyncIterator[str]:
    try:
        for chunk in answers.chunks(first):
            yield sse(chunk)
        while not answers.complete:
            for chunk in answers.chunks(await conversation.next()):
                yield sse(chunk)
        if usage:
            yield sse(answers.usage_chunk())
    except APIError as error:  # the status is out: it comes as an event
        yield sse(error.body())
    yield DONE


async def _hung_up(request: Request) -> None:
    """Returns when the client has closed the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, cfg: ServeConfig) -> bytes:
    """The whole body. Raises APIError: 413 as soon as it is known to be too long, 408 when it takes too long."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > cfg.max_body_bytes:
        raise errors.too_large(cfg.max_body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(cfg.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > cfg.max_body_bytes:
                    raise errors.too_large(cfg.max_body_bytes)
    except TimeoutError:
        raise errors.timed_out(f"The request body took longer than {cfg.body_timeout_s:g} seconds.") from None
    except ClientDisconnect:
        raise errors.timed_out("The request body did not arrive.") from None
    return bytes(body)
