"""The official openai client against the server: answers whole and streamed, and how requests end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from vlm_nemo.serve.run import Server

from .parrot import CAPACITY, PER_IMAGE, Parrot, http, image_part, png, reply, served, until, user

ASKED = {"model": "parrot", "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as made:
        yield made


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def test_a_plain_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "What do you see?"}], **ASKED)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", reply(0), "stop")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "parrot"
    assert choice.logprobs is None


@pytest.mark.parametrize("images", [0, 1, 2])
def test_images_and_their_tokens(client: openai.OpenAI, images: int) -> None:
    parts = [image_part(png(20 + i, 12)) for i in range(images)]
    answer = client.chat.completions.create(messages=user(*parts, "What do you see?"), **ASKED)
    assert answer.choices[0].message.content == reply(images)
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.multimodal_tokens == {"image": images * PER_IMAGE}


def test_images_come_first_whatever_their_place(parrot: Parrot) -> None:
    with served(parrot) as server, connect(server) as client:
        for parts in ((image_part(), image_part(), "a", "b"), ("a", image_part(), "b", image_part())):
            client.chat.completions.create(messages=user(*parts), max_tokens=1, **ASKED)
    first, second = parrot.prompts
    assert first == second
    t = parrot.tokenizer
    image = [t.image_id] * PER_IMAGE
    assert first[-len(t.encode("\na\nb ASSISTANT:")) :] == t.encode("\na\nb ASSISTANT:")
    assert any(first[i : i + 9] == image + t.encode("\n") + image for i in range(len(first)))


def test_each_image_reaches_the_model_in_order(parrot: Parrot) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    with served(parrot) as server, connect(server) as client:
        parts = [image_part(png(colour=colour)) for colour in colours]
        client.chat.completions.create(messages=user(*parts, "x"), max_tokens=1, **ASKED)
    (images,) = parrot.images
    assert images is not None and images.count == 3 and images.patches.shape == (12, 192)
    assert [tuple(patches[0, :3]) for patches in images.patches.reshape(3, 4, 192)] == colours


def test_a_conversation_of_turns(parrot: Parrot) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *user(image_part(), "What is it?"),
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Sure?"},
    ]
    with served(parrot) as server, connect(server) as client:
        answer = client.chat.completions.create(messages=turns, **ASKED)
    assert answer.choices[0].message.content == reply(1)
    assert parrot.tokenizer.eos_id in parrot.prompts[0]  # closes the assistant's turn


def test_streaming_says_the_same_with_usage_at_the_end(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": user(image_part(), "What do you see?"), **ASKED}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert sum(bool(c.choices[0].delta.content) for c in chunks[:-1]) > 5  # it really comes bit by bit
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_streaming_without_usage_and_the_wire_format(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 3, "temperature": 0}
    with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in "".join(events)


def test_several_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": user("x"), "model": "parrot", "n": 3, "temperature": 1.5, "seed": 5}
    answer = client.chat.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    single = client.chat.completions.create(**{**asked, "n": 1})
    assert answer.usage.completion_tokens > single.usage.completion_tokens  # all of them count


@pytest.mark.parametrize("seed", [7, -7, 2**63 - 1, -(2**63)])
def test_a_seed_repeats_an_answer(client: openai.OpenAI, seed: int) -> None:
    def say(seed: int | None) -> str:
        asked: dict[str, Any] = {"messages": user("x"), "model": "parrot", "temperature": 2, "seed": seed}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert say(seed) == say(seed)
    assert len({say(None) for _ in range(6)}) > 1


def test_stop_and_lengths(client: openai.OpenAI) -> None:
    def end(**asked: Any) -> tuple[str | None, str, Any]:
        choice = client.chat.completions.create(messages=user("x"), **ASKED, **asked).choices[0]
        return choice.message.content, choice.finish_reason, choice.stop_reason

    assert end(stop="two") == (" I see 0 pictures here: one, ", "stop", "two")
    assert end(stop=["nothing", "es he"]) == (" I see 0 pictur", "stop", "es he")
    text, reason, _ = end(max_tokens=2)
    assert reason == "length" and reply(0).startswith(text)
    assert end(max_tokens=50, max_completion_tokens=2)[:2] == (text, "length")


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": user("x"), "logprobs": True, "top_logprobs": 2, "max_tokens": 4, **ASKED}
    (choice,) = client.chat.completions.create(**asked).choices
    content = choice.logprobs.content
    assert len(content) == 4
    assert "".join(item.token for item in content) == choice.message.content
    for item in content:
        assert len(item.top_logprobs) == 2 and item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob
        assert item.top_logprobs[0].token == item.token and item.logprob == item.top_logprobs[0].logprob < 0
        assert bytes(item.bytes).decode() == item.token
    streamed = [
        item
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for item in chunk.choices[0].logprobs.content
    ]
    assert streamed == content
    bare = client.chat.completions.create(messages=user("x"), logprobs=True, max_tokens=2, **ASKED)
    assert [item.top_logprobs for item in bare.choices[0].logprobs.content] == [[], []]


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.max_model_len) == ("parrot", "model", CAPACITY)
    assert client.models.retrieve("parrot").id == "parrot"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        client.chat.completions.create(model="other", messages=user("x"))


# --- many at once -------------------------------------------------------------------------------------------------


def test_requests_share_batches_and_do_not_mix(parrot: Parrot) -> None:
    parrot.delay = 0.002
    with served(parrot) as server, connect(server) as client, ThreadPoolExecutor(12) as pool:

        def ask(images: int) -> str:
            parts = [image_part() for _ in range(images)]
            return client.chat.completions.create(messages=user(*parts, "x"), **ASKED).choices[0].message.content

        counts = [i % 3 for i in range(12)]
        assert list(pool.map(ask, counts)) == [reply(n) for n in counts]
    assert max(parrot.batches) > 1


def test_a_full_queue_says_429_and_a_free_one_answers(parrot: Parrot) -> None:
    with served(parrot, max_waiting=2) as server, connect(server) as client, ThreadPoolExecutor(8) as pool:
        parrot.go.clear()
        ask = lambda: client.chat.completions.create(messages=user("x"), **ASKED)  # noqa: E731
        held = [pool.submit(ask)]
        until(lambda: server.loop._engine_waiting + server.loop.running == 1 and not server.loop._inbox)
        held.append(pool.submit(ask))
        until(lambda: server.loop.waiting == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            ask()
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.response.json()["error"]["code"] == 429
        parrot.go.set()
        assert [f.result().choices[0].message.content for f in held] == [reply(0)] * 2
        assert ask().choices[0].finish_reason == "stop"
        assert server.loop.waiting == 0


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels(parrot: Parrot, stream: bool) -> None:
    parrot.delay = 0.01
    body = {"messages": user("x"), "ignore_eos": True, "max_tokens": 150, "stream": stream, "temperature": 0}
    with served(parrot) as server:
        url = f"{server.url}/v1/chat/completions"
        if stream:
            with http.stream("POST", url, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(url, json=body, timeout=httpx.Timeout(5, read=0.2))
        until(lambda: server.loop.running == 0 and not server.loop._open, 1.0)
        text = http.get(f"{server.url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="parrot"} 1.0' in text
        assert server.loop.model is not None and server.loop.model.engine.cache_usage == 0


# --- when it does not work ----------------------------------------------------------------------------------------


def test_an_engine_that_breaks(parrot: Parrot) -> None:
    with served(parrot) as server, connect(server) as client:
        parrot.delay = 0.05
        stream = client.chat.completions.create(messages=user("x"), stream=True, **ASKED)
        next(stream)
        parrot.failure = RuntimeError("a secret of the machine")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "secret" not in str(caught.value)
        ready = http.get(f"{server.url}/v1/health/ready")
        assert (ready.status_code, ready.json()["message"]) == (503, "The engine has died.")
        assert http.get(f"{server.url}/v1/health/live").status_code == 200
        with pytest.raises(openai.InternalServerError) as later:
            client.chat.completions.create(messages=user("x"), **ASKED)
        assert later.value.status_code == 503


def test_among_several_ranks_a_broken_engine_ends_the_server(parrot: Parrot) -> None:
    with served(parrot, several=True) as server, connect(server) as client:
        parrot.failure = RuntimeError("gone")
        with pytest.raises(openai.APIError):
            client.chat.completions.create(messages=user("x"), **ASKED)
        until(lambda: server.should_exit)


def test_what_the_engine_cannot_do_is_a_500_of_one_request(parrot: Parrot) -> None:
    parrot.failure = ValueError("4 placeholders for 5 embeddings")
    with served(parrot) as server, connect(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(messages=user("x"), **ASKED)
        assert caught.value.status_code == 500 and "embeddings" not in str(caught.value)
        parrot.failure = None
        assert client.chat.completions.create(messages=user("x"), **ASKED).choices[0].finish_reason == "stop"


def test_while_the_model_loads(parrot: Parrot) -> None:
    from .parrot import make_model

    go = threading.Event()
    with served(parrot, lambda: make_model(parrot) if go.wait(10) else None) as server:
        until(lambda: server.started)
        try:
            ready = http.get(f"{server.url}/v1/health/ready")
            assert (ready.status_code, ready.json()["message"]) == (503, "The model is loading.")
            assert http.get(f"{server.url}/v1/health/live").status_code == 200
            asked = http.post(f"{server.url}/v1/chat/completions", json={"messages": user("x")})
            assert asked.status_code == 503
        finally:
            go.set()
        until(lambda: http.get(f"{server.url}/v1/health/ready").status_code == 200)


def test_stopping_lets_running_answers_end(parrot: Parrot) -> None:
    parrot.delay = 0.01
    with served(parrot) as server, connect(server) as client:
        stream = client.chat.completions.create(messages=user("x"), stream=True, **ASKED)
        begun = next(stream)
        server.handle_exit(15, None)
        until(lambda: server.loop.stopping)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "stop" and begun.id == rest[-1].id
        until(lambda: server.loop.ended)


def test_stopping_does_not_wait_for_ever(parrot: Parrot) -> None:
    parrot.delay = 0.05
    with served(parrot, drain_s=0.3) as server, connect(server) as client:
        stream = client.chat.completions.create(
            messages=user("x"), stream=True, max_tokens=150, extra_body={"ignore_eos": True}, **ASKED
        )
        next(stream)
        server.handle_exit(15, None)
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(stream)
