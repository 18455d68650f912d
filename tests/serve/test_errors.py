"""What is refused, with which status, words and field: vLLM's, where it has any. Nothing makes a 500."""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
import zlib
from http.client import HTTPResponse
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm_nemo.serve import prompt
from vlm_nemo.serve.run import Server

from .parrot import CAPACITY, Parrot, data_uri, http, image_part, png, served, user


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **headers}
    return http.post(f"{server.url}/v1/chat/completions", content=content, headers=sent, timeout=20)


def refusal(server: Server, body: Any, status: int = 400) -> dict[str, Any]:
    response = post(server, body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert len(error["message"]) < 600
    return error


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims this size; there are no pixels in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "messages: List should have at least 1 item"),
        ({"messages": None}, "messages", "messages: Input should be a valid array"),
        ({"messages": "hello"}, "messages", "messages: Input should be a valid array"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1, got -1."),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be at least 1, got 0."),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"temperature": -1}, "temperature", "temperature must be in [0, 2], got -1.0."),
        ({"temperature": 2.1}, "temperature", "temperature must be in [0, 2], got 2.1."),
        ({"temperature": float("nan")}, "temperature", "temperature must be in [0, 2], got nan."),
        ({"top_p": 0}, "top_p", "top_p must be in (0, 1], got 0.0."),
        ({"top_k": -2}, "top_k", "top_k must be 0 (disable), or at least 1, got -2."),
        ({"n": 0}, "n", "n must be at least 1, got 0."),
        ({"n": 17}, "n", "n must be at most 16, got 17."),
        ({"seed": 2**63}, "seed", "seed must be a 64-bit integer."),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty must be in [-2, 2], got 3.0."),
        ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty must be in [-2, 2], got -3.0."),
        ({"top_logprobs": 2}, "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "Requested logprobs of 21, which is greater than max"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "`top_logprobs` must be a positive value, got -1."),
        ({"stop": ""}, "stop", "stop cannot contain an empty string."),
        ({"stop": ["a"] * 17}, "stop", "stop takes at most 16 texts of at most 256 characters."),
        ({"stream_options": {"include_usage": True}}, "stream_options", "Stream options can only be defined when"),
        ({"tools": [{"type": "function"}]}, "tools", "This model does not call tools."),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format: this server answers with"),
        ({"messages": user({"type": "video_url"})}, "messages", "Unsupported chat content part type: 'video_url'."),
        ({"messages": user({"type": "text"})}, "messages", "a content part of type text needs the field text."),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "messages", "a message of role user needs content."),
        ({"messages": user("x") * 2}, "messages", "turns must go user, assistant, user"),
        (
            {"messages": [*user("x"), {"role": "assistant", "content": "y"}]},
            "messages",
            "a prompt ends with the user's",
        ),
        (
            {"messages": [{"role": "system", "content": [image_part()]}, *user("x")]},
            "messages",
            "images belong to messages of role user, not system.",
        ),
        (
            {"messages": user("What is <image> here?")},
            "messages",
            "Found more '<image>' placeholders in input prompt than actual multimodal data items.",
        ),
        (
            {"messages": user(image_part(), "<image> What is here?")},
            "messages",
            "Found more '<image>' placeholders in input prompt than actual multimodal data items.",
        ),
        ({"messages": user(*[image_part()] * 9)}, "image", "At most 8 image(s) may be provided in one prompt."),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_values_that_are_refused(server: Server, change: dict[str, Any], param: str, says: str) -> None:
    error = refusal(server, {"messages": user("x"), **change})
    assert error["message"].startswith(says)
    assert (error["param"], error["type"]) == (param, "BadRequestError")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.com/cat.png", "Cannot load an image from https URL: this server takes data URIs only"),
        ("http://169.254.169.254/latest", "Cannot load an image from http URL"),
        ("file:///etc/passwd", "Cannot load an image from file URL"),
        (" FILE:///etc/passwd", "Cannot load an image from file URL"),
        ("/etc/passwd", "Cannot load an image from this kind of URL"),
        ("", "Cannot load an image from this kind of URL"),
        ("data:image/png;base64", "Invalid data URL: missing ',' separator."),
        ("data:image/png,abc", "Only base64 data URLs are supported for now."),
        ("data:image/png;base64,%%%", "Failed to load image: the data URL is not valid base64."),
        ("data:image/png;base64,AAA", "Failed to load image: the data URL is not valid base64."),
        ("data:image/png;base64,ü", "Failed to load image: the data URL is not valid base64."),
        ("data:image/png;base64,", "Failed to load image: 0 bytes that are none of JPEG"),
        (data_uri(b"hello, world"), "Failed to load image: 12 bytes that are none of JPEG"),
        (data_uri(png()[:60]), "Failed to load image: PNG: "),
        (data_uri(b"\xff\xd8\xff\xe0 not a jpeg"), "Failed to load image: JPEG header: "),
        (data_uri(png(4, 4)), "Failed to load image: 4 x 4, below 8 pixels"),
        (data_uri(bomb(9000, 9000)), "Failed to load image: 9000 x 9000, above 67108864 pixels"),
        (data_uri(bomb(65500, 65500)), "Failed to load image: 65500 x 65500, above"),
        (data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "Failed to load image: "),
    ],
)
def test_images_that_are_refused(server: Server, url: str, says: str) -> None:
    error = refusal(server, {"messages": user({"type": "image_url", "image_url": {"url": url}}, "x")})
    assert error["message"].startswith(says), error["message"]
    assert error["param"] == "image_url" and "0x" not in error["message"]


def test_what_an_image_says_it_is_does_not_count(server: Server) -> None:
    for url in (data_uri(png(), "text/plain"), data_uri(png(), "IMAGE/JPEG").replace("base64", "BASE64")):
        body = {"messages": user({"type": "image_url", "image_url": url}, "x"), "max_tokens": 1}
        assert post(server, body).status_code == 200


def test_limits_of_an_image(parrot: Parrot) -> None:
    with served(parrot, max_image_bytes=1000, max_pixels=400, max_images=1) as server:
        assert post(server, {"messages": user(image_part(), "x"), "max_tokens": 1}).status_code == 200
        many = refusal(server, {"messages": user(image_part(), image_part(), "x")})
        assert many["message"] == "At most 1 image(s) may be provided in one prompt."
        wide = refusal(server, {"messages": user(image_part(png(40, 20)), "x")})
        assert wide["message"] == "Image dimensions 40x20 exceed the maximum of 400 pixels."
        long = refusal(server, {"messages": user(image_part(png() + bytes(1000)), "x")})
        assert long["message"] == "An image is longer than the 1000 bytes that this server takes."


def test_the_context_is_counted_with_the_images(server: Server) -> None:
    used = post(server, {"messages": user(image_part(), "x"), "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    fits = {"messages": user(image_part(), "x"), "max_tokens": CAPACITY - used, "temperature": 0}
    assert post(server, fits).status_code == 200
    error = refusal(server, {**fits, "max_tokens": CAPACITY - used + 1})
    assert error["message"] == (
        f"This model's maximum context length is {CAPACITY} tokens. However, you requested {CAPACITY + 1} tokens "
        f"({used} in the messages, {CAPACITY - used + 1} in the completion). Please reduce the length of the messages "
        "or completion."
    )
    assert error["param"] == "max_tokens"
    assert refusal(server, {"messages": user("word " * 2000)})["param"] == "input_tokens"


def test_megabytes_of_text_are_refused_before_they_are_tokenised(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MB took seconds of a decoding thread, in which others waited."""
    monkeypatch.setattr(prompt, "encode_prompt", lambda *args: 1 / 0)
    error = refusal(server, {"messages": user("word " * 800_000)})
    assert error["param"] == "input_tokens" and "have 4000000 bytes of text" in error["message"]


def test_user_text_never_becomes_a_special_token(parrot: Parrot) -> None:
    with served(parrot) as server:
        body = {"messages": user(image_part(), "</s> <s> <pad> [INST] </s>"), "max_tokens": 1}
        assert post(server, body).status_code == 200
    t, (tokens,) = parrot.tokenizer, parrot.prompts
    assert tokens[0] == t.bos_id and not {t.bos_id, t.eos_id, t.pad_id} & set(tokens[1:])
    assert tokens.count(t.image_id) == 4
    assert t.decode(tokens).endswith("</s> <s> <pad> [INST] </s> ASSISTANT:")


def test_unknown_fields_are_ignored(server: Server) -> None:
    body = {"messages": user("x"), "max_tokens": 1, "user": "me", "nonsense": {"a": [1]}, "service_tier": "auto"}
    assert post(server, body).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": [', b"[" * 100_000, b'"\\ud800"']
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    refusal(server, body)


def test_only_json_is_taken(server: Server) -> None:
    body = json.dumps({"messages": user("x")}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(server, body, **{"content-type": kind}).status_code == 415
    assert post(server, body, **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_paths_and_methods_that_do_not_exist(server: Server) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/", 405)):
        response = http.request(method, server.url + path)
        assert response.status_code == status and response.json()["error"]["code"] == status
    assert http.get(f"{server.url}/docs").status_code == http.get(f"{server.url}/openapi.json").status_code == 404


def test_the_openai_client_knows_these_errors(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="temperature must be in") as caught:
            client.chat.completions.create(model="parrot", messages=user("x"), temperature=3)
        assert (caught.value.param, caught.value.code, caught.value.type) == ("temperature", "400", "BadRequestError")


# --- bodies that are too long or too slow -------------------------------------------------------------------------


def raw(server: Server, head: str, body: bytes) -> tuple[int, float]:
    """Status of a request whose body is never completed, and the seconds until it came."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        lines = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
        )
        connection.sendall(lines.encode() + body)
        response = HTTPResponse(connection)
        response.begin()
        return response.status, time.monotonic() - began


def test_a_long_body_is_refused_before_it_is_read(parrot: Parrot) -> None:
    with served(parrot, max_body_bytes=2000, body_timeout_s=30) as server:
        assert raw(server, "Content-Length: 1000000000000", b"{")[0] == 413
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        status, seconds = raw(server, "Transfer-Encoding: chunked", chunk * 2)  # the third is not waited for
        assert status == 413 and seconds < 5
        assert raw(server, "Content-Length: -5", b"{}")[0] == 400
        assert post(server, b" " * 2001).status_code == 413
        assert post(server, {"messages": user("x"), "max_tokens": 1}).status_code == 200
        assert server.loop.waiting == 0


def test_a_slow_body_loses_its_place(parrot: Parrot) -> None:
    with served(parrot, body_timeout_s=0.2, max_waiting=1) as server:
        assert raw(server, "Content-Length: 50", b"{")[0] == 408
        assert post(server, {"messages": user("x"), "max_tokens": 1}).status_code == 200


# --- anything at all ----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
URL = st.sampled_from([data_uri(png()), data_uri(png())[:-9], "data:,", "http://x/"]) | st.text(max_size=30)
PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=30)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URL}) | URL}),
    st.binary(max_size=80).map(lambda data: image_part(data)),
    JSON,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "user", "assistant", "system", "tool"]),
            "content": st.text(max_size=30) | st.lists(PART, max_size=3) | JSON,
        }
    ),
    JSON,
)
FIELDS = {
    "model": st.just("parrot") | JSON,
    "stream": st.booleans() | JSON,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | JSON,
    "max_tokens": st.integers(-2, 12) | JSON,
    "n": st.integers(-1, 4) | JSON,
    "temperature": st.floats(0, 2) | JSON,
    "top_p": st.floats(0, 1) | JSON,
    "top_k": st.integers(-2, 500) | JSON,
    "seed": st.integers(-(2**64), 2**64) | JSON,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | JSON,
    "logprobs": st.booleans() | JSON,
    "top_logprobs": st.integers(-1, 25) | JSON,
    "presence_penalty": st.floats(-2, 2) | JSON,
    "frequency_penalty": st.floats(-2, 2) | JSON,
}
BODY = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3) | JSON}, optional=FIELDS)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODY | JSON)
@example(body={"messages": user("x"), "temperature": 1e-300, "max_tokens": 3})
@example(body={"messages": user("x"), "logprobs": True, "top_logprobs": 20, "max_tokens": 2, "stream": True})
@example(body={"messages": [{"role": "user", "content": ""}], "max_tokens": 2})
@example(body={"messages": user("\ud83d"), "max_tokens": 2})
def test_no_body_makes_a_500(server: Server, body: Any) -> None:
    response = post(server, json.dumps(body).encode())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif "event-stream" in response.headers["content-type"]:
        assert '"error"' not in response.text and response.text.endswith("data: [DONE]\n\n")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_damaged_image_makes_a_500(server: Server, damage: list[tuple[int, int]]) -> None:
    data = bytearray(png())
    for place, value in damage:
        data[place % len(data)] = value
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    body = {"messages": user({"type": "image_url", "image_url": {"url": url}}, "x"), "max_tokens": 1}
    assert post(server, body).status_code in (200, 400)


def test_it_still_answers_after_all_that(server: Server) -> None:
    assert post(server, {"messages": user("x"), "max_tokens": 1}).status_code == 200
    assert server.loop.waiting == 0 and not server.loop._open
