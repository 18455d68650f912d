"""A model that always says the same, for the server's tests: the engine is the real one, only the backend is played.

The reply to a prompt says how many images came with it: " I see 2 pictures here: one, two, three." A test may hold it,
slow it down or break it.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.engine import Engine
from vlm_nemo.infer.load import LoadedModel
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.run import Server
from vlm_nemo.types import Images

SPEC = image_spec(LayoutConfig(aspect="squash"), size=16, patch=8)
PER_IMAGE = 4
CAPACITY = 400

http = httpx.Client(timeout=20)
"""One for all tests: each new client would set up TLS."""


def reply(images: int) -> str:
    return f" I see {images} pictures here: one, two, three, four."


class Parrot:
    """The backend. Its likeliest next token is the reply's; others are likely enough for sampling to differ."""

    def __init__(self, tokenizer: Tokenizer, slots: int = 4) -> None:
        self.slots, self.capacity = slots, CAPACITY
        self.tokenizer = tokenizer
        self.seen: dict[int, tuple[int, list[int]]] = {}
        self.images: list[Images[NDArray[Any]] | None] = []
        self.prompts: list[list[int]] = []
        self.batches: list[int] = []
        self.delay = 0.0
        self.failure: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        assert self.go.wait(30)
        time.sleep(self.delay)
        if self.failure is not None:
            raise self.failure
        self.batches.append(len(rows))
        logits = np.zeros((len(rows), self.tokenizer.vocab_size + 3), np.float32)
        for at, row in zip(logits, rows, strict=True):
            if row.start == 0:
                count = 0 if row.images is None else row.images.count
                self.images.append(row.images)
                self.prompts.append(list(row.tokens))
                self.seen[row.slot] = (len(row.tokens), [*self.tokenizer.encode(reply(count)), self.tokenizer.eos_id])
            length, said = self.seen[row.slot]
            step = row.start + len(row.tokens) - length
            at[:] = -8
            at[self.tokenizer.encode(" four")[:1]] = 1
            at[said[min(step, len(said) - 1)]] = 2
        return logits


def make_tokenizer(folder: Path) -> Tokenizer:
    train_tokenizer([reply(n) for n in range(10)] * 3 + ["What do you see? USER: ASSISTANT:"] * 3, 340, folder)
    return Tokenizer(folder)


def make_model(backend: Parrot) -> LoadedModel:
    return LoadedModel(
        name="parrot",
        tokenizer=backend.tokenizer,
        template=TEMPLATES["vicuna"],
        spec=SPEC,
        engine=Engine(backend, backend.tokenizer),
        info={"backend": "parrot", "precision": "fp32", "source": "/secret/place", "context_length": CAPACITY},
    )


@contextmanager
def served(backend: Parrot, open_model: Callable[[], LoadedModel] | None = None, **cfg: object) -> Iterator[Server]:
    """A real server on a free port of this machine."""
    several = bool(cfg.pop("several", False))
    options = {"port": 0, "drain_s": 5.0, "access_log": False, **cfg}
    server = Server(open_model or (lambda: make_model(backend)), ServeConfig(**options), several=several)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.listen, daemon=True)
    thread.start()
    if open_model is None:
        until(lambda: server.started and server.loop.why_not is None)
    try:
        yield server
    finally:
        backend.go.set()
        server.should_exit = True
        server.loop.drain(0)
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def png(width: int = 20, height: int = 12, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_uri(png() if data is None else data), "detail": "low"}}


def user(*parts: object) -> list[dict[str, object]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]
