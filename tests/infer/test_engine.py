"""Greedy decoding in slots of a row equals decoding each request by itself, a whole forward a token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests import tiny
from vlm_nemo.infer.engine import Engine, Request
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

EOS = 2


@pytest.fixture
def engine() -> Iterator[Engine]:
    with device.adapter():
        ranks = groups.start(ParallelConfig(), seed=0)
        (chunk,) = build_model(tiny.tiny_model(), ParallelConfig(), "fp32", seed=3)
        yield Engine(
            chunk=chunk,
            cfg=tiny.tiny_model(),
            ranks=ranks,
            image_token=tiny.IMAGE,
            pad_token=tiny.PAD,
            eos_token=EOS,
            vocab_size=60,
            row_tokens=64,
        )
        groups.stop()


def request(seed: int, length: int, images: int) -> Request:
    tokens, _, pixels = tiny.sample(seed, length, images)
    return Request(tokens=tokens.tolist(), images=lambda: pixels)


REQUESTS = [
    partial(request, 1, 9, 1),
    partial(request, 2, 17, 2),
    partial(request, 3, 5, 0),
    partial(request, 4, 30, 1),
]


@torch.no_grad()
def by_hand(engine: Engine, asked: Request, room: int) -> list[int]:
    tokens, answer = list(asked.tokens), []
    for _ in range(room):
        row = tiny.row([(torch.tensor(tokens), torch.full((len(tokens),), -100), asked.images())], len(tokens))
        batch = model_batch(row, image_token=tiny.IMAGE, tokens_per_image=4, image_size=16, device=device.device())
        token = int(engine.chunk.eval()(batch, gather_logits=True)[0, -1, :60].argmax())
        if token == EOS:
            break
        answer.append(token)
        tokens.append(token)
    return answer


def test_equals_one_forward_a_token(engine: Engine) -> None:
    requests = [make() for make in REQUESTS]
    together = engine.generate(requests, 7)
    assert together == [by_hand(engine, asked, 7) for asked in requests]
    assert len({tuple(answer) for answer in together}) == len(requests), "the answers must differ to show anything"


def test_row_mates_and_order_do_not_matter(engine: Engine) -> None:
    requests = [make() for make in REQUESTS]
    together = engine.generate(requests, 5)
    assert [engine.generate([asked], 5)[0] for asked in requests] == together
    assert engine.generate(requests[::-1], 5) == together[::-1]


def test_eos_ends_an_answer(engine: Engine) -> None:
    asked = REQUESTS[0]()
    (long,) = engine.generate([asked], 6)
    engine.eos_token = long[2]
    (short,) = engine.generate([asked], 6)
    assert short == long[: long.index(long[2])]


def test_too_long_is_the_user_s_error(engine: Engine) -> None:
    with pytest.raises(
        UserError, match="a prompt of 9 tokens and 5000 new ones exceed model.language.max_positions=4096"
    ):
        engine.generate([REQUESTS[0]()], 5000)
