"""The body of POST /v1/chat/completions: OpenAI's fields, vLLM's limits and words. Unknown fields are ignored."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.serve.errors import APIError, bad_request

MAX_STOPS = 16
"""Stop texts a request, and below how long each may be: every step compares the answer's end with all of them."""
MAX_STOP_LENGTH = 256


class _Lenient(BaseModel):
    # hide_input: an error must not repeat a megabyte of base64
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)


class ImageURL(_Lenient):
    url: str
    """data:image/…;base64,… (`detail` beside it is accepted and ignored)"""


class Part(_Lenient):
    """A piece of a message: {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}."""

    type: str
    text: str | None = None
    image_url: ImageURL | str | None = None


class ChatMessage(_Lenient):
    role: str
    content: str | list[Part] | None = None


class StreamOptions(_Lenient):
    include_usage: bool | None = False


class ChatRequest(_Lenient):
    """One request, types checked; `sampling` checks the values."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = False
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None


def parse(body: bytes) -> ChatRequest:
    """JSON to a request. Raises APIError (400) that names the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> APIError:
    """The first two complaints in one line, each with the place that it is about."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # A union complains once for each of its types, with the type's name as the last word of the place
    places = [".".join(str(word) for word in item["loc"]) for item in found]
    lines = [f"{place}: {item['msg']}" if place else item["msg"] for place, item in zip(places, found, strict=True)]
    return bad_request("; ".join(lines[:2]), str(found[0]["loc"][0]) if found[0]["loc"] else None)


def sampling(request: ChatRequest, *, prompt_tokens: int, context: int, choices: int, logprobs: int) -> SamplingParams:
    """What the engine is asked to do.

    context: tokens of prompt and answer together that the model holds; without max_tokens the answer may fill it.
    choices, logprobs: the largest n and top_logprobs.
    Raises APIError (400), in vLLM's words.
    """
    for param, says in _complaints(request, choices, logprobs):
        raise bad_request(says, param)
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    room = context - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = 1 if asked is None else asked
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt_tokens + wanted} "
            f"tokens ({prompt_tokens} in the messages, {wanted} in the completion). Please reduce the length of the "
            "messages or completion.",
            "input_tokens" if room < 1 else "max_tokens",
        )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingParams(
        n=_or(request.n, 1),
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(_or(request.top_k, 0), 0),
        # Drawn here, not in the engine: under several ranks all of them have to draw the same answer
        seed=secrets.randbits(62) if request.seed is None else request.seed % (1 << 63),
        stop=stop,
        max_tokens=room if asked is None else asked,
        logprobs=_or(request.top_logprobs, 0) if request.logprobs else None,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        ignore_eos=bool(request.ignore_eos),
    )


def _complaints(request: ChatRequest, choices: int, logprobs: int) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it). NaN fails every comparison, so each is written as what must hold."""
    n, top = _or(request.n, 1), request.top_logprobs
    if not n >= 1:
        yield "n", f"n must be at least 1, got {n}."
    if not n <= choices:
        yield "n", f"n must be at most {choices}, got {n}."
    if not 0 <= _or(request.temperature, 1.0) <= 2:
        yield "temperature", f"temperature must be in [0, 2], got {request.temperature}."
    if not 0 < _or(request.top_p, 1.0) <= 1:
        yield "top_p", f"top_p must be in (0, 1], got {request.top_p}."
    if not _or(request.top_k, 0) >= -1:
        yield "top_k", f"top_k must be 0 (disable), or at least 1, got {request.top_k}."
    for name in ("max_tokens", "max_completion_tokens"):
        tokens = getattr(request, name)
        if tokens is not None and not tokens >= 1:
            yield name, f"{name} must be at least 1, got {tokens}."
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(request, name)
        if penalty is not None and not -2 <= penalty <= 2:
            yield name, f"{name} must be in [-2, 2], got {penalty}."
    if request.seed is not None and not -(1 << 63) <= request.seed < 1 << 63:
        yield "seed", "seed must be a 64-bit integer."
    if top is not None and not request.logprobs:
        yield "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."
    if top is not None and not top >= 0:
        yield "top_logprobs", f"`top_logprobs` must be a positive value, got {top}."
    if top is not None and not top <= logprobs:
        yield "top_logprobs", f"Requested logprobs of {top}, which is greater than max allowed: {logprobs}"
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not all(stops):
        yield "stop", "stop cannot contain an empty string."
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        yield "stop", f"stop takes at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters."
    if request.stream_options is not None and not request.stream:
        yield "stream_options", "Stream options can only be defined when `stream=True`."
    if request.tools and request.tool_choice != "none":
        yield "tools", "This model does not call tools."
    if (request.response_format or {}).get("type", "text") != "text":
        yield "response_format", "response_format: this server answers with text only."


def _or(value: Any, default: Any) -> Any:
    """`value`, or what a field that is null or missing means."""
    return default if value is None else value
