"""A real attention model in numpy, with a KV cache and without one, and a tokenizer: what the engine is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.squares import squares
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.backend import Row
from vlm_nemo.types import Images

SPEC = image_spec(LayoutConfig(aspect="squash"), size=16, patch=8)
PER_IMAGE = 4
"""Embeddings."""
WIDTH, LAYERS = 16, 2
TEXTS = ["what is this? a red circle", "two blue squares, one über café 日本", "is it <|end|> or not"] * 20
PLAN = plan_image(SPEC, (16, 16))
"""Of an image of any size."""


def make_tokenizer(folder: Path, vocab: int = 300) -> Tokenizer:
    train_tokenizer(TEXTS, vocab, folder)
    return Tokenizer(folder)


class Weights:
    """A decoder of two layers, one head each; an image's four embeddings are the means of its quarters."""

    def __init__(self, vocab: int, image_id: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.vocab, self.image_id = vocab, image_id
        self.embedding = random.normal(size=(vocab, WIDTH))
        self.positions = random.normal(size=(512, WIDTH)) * 0.5
        self.layers = [[random.normal(size=(WIDTH, WIDTH)) / 4 for _ in range(4)] for _ in range(LAYERS)]
        self.vision = random.normal(size=(3, WIDTH)) / 60
        self.head = random.normal(size=(WIDTH, vocab)) / 2

    def embed(self, tokens: Sequence[int], images: Images[NDArray[Any]] | None) -> NDArray[np.float64]:
        """[n, WIDTH]. Raises ValueError with both counts where placeholders and images disagree."""
        ids = np.array(tokens)
        x = self.embedding[ids].copy()
        where = ids == self.image_id
        count = 0 if images is None else images.count
        if where.sum() != count * PER_IMAGE:
            raise ValueError(f"{where.sum()} placeholders, {count} images of {PER_IMAGE}")
        if images is not None and count:
            x[where] = images.patches.reshape(-1, 64, 3).mean(1) @ self.vision
        return x

    def whole(self, tokens: Sequence[int], images: Images[NDArray[Any]] | None) -> NDArray[np.float32]:
        """Logits after the last token, [V], without any cache: the witness."""
        x = self.embed(tokens, images) + self.positions[: len(tokens)]
        hidden = np.tril(np.ones((len(tokens), len(tokens)))) == 0
        for q, k, v, o in self.layers:
            scores = np.where(hidden, -np.inf, (x @ q) @ (x @ k).T / WIDTH**0.5)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            x = np.tanh(x + weights / weights.sum(1, keepdims=True) @ (x @ v) @ o)
        return (x[-1] @ self.head).astype(np.float32)


class NumpyBackend:
    """The same model with a cache. It holds the engine to the contract: `Backend`, `Row`."""

    def __init__(self, weights: Weights, slots: int = 3, capacity: int = 96) -> None:
        self.weights, self.slots, self.capacity = weights, slots, capacity
        self.cache = np.full((slots, LAYERS, 2, capacity, WIDTH), 1e9)
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.runs: list[list[Row]] = []

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        assert rows and len({row.slot for row in rows}) == len(rows), "rows name different slots"
        assert all(0 <= row.slot < self.slots for row in rows)
        embedded = [self.weights.embed(row.tokens, row.images) for row in rows]
        self.runs.append(list(rows))
        return np.stack([self._row(row, x) for row, x in zip(rows, embedded, strict=True)])

    def _row(self, row: Row, x: NDArray[np.float64]) -> NDArray[np.float32]:
        assert len(row.tokens) >= 1 and row.start in (0, len(self.held[row.slot])), "start is what is cached"
        self.held[row.slot] = [*self.held[row.slot][: row.start], *row.tokens]
        end = row.start + len(row.tokens)
        assert end <= self.capacity
        x = x + self.weights.positions[row.start : end]
        hidden = np.arange(end) > np.arange(row.start, end)[:, None]
        for (q, k, v, o), cache in zip(self.weights.layers, self.cache[row.slot], strict=True):
            cache[0, row.start : end], cache[1, row.start : end] = x @ k, x @ v
            scores = np.where(hidden, -np.inf, (x @ q) @ cache[0, :end].T / WIDTH**0.5)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            x = np.tanh(x + weights / weights.sum(1, keepdims=True) @ cache[1, :end] @ o)
        return (x[-1] @ self.weights.head).astype(np.float32)


class ScriptBackend:
    """Says given tokens, whatever is asked: the answer of a prompt that begins with token i is scripts[i]."""

    def __init__(self, vocab: int, scripts: dict[int, Sequence[int]], slots: int = 4, capacity: int = 200) -> None:
        self.vocab, self.scripts, self.slots, self.capacity = vocab, scripts, slots, capacity
        self._slots: dict[int, tuple[int, int]] = {}

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        logits = np.zeros((len(rows), self.vocab), np.float32)
        for i, row in enumerate(rows):
            if row.start == 0:
                self._slots[row.slot] = (row.tokens[0], 0)
            key, at = self._slots[row.slot]
            logits[i, self.scripts[key][at]] = 9
            self._slots[row.slot] = (key, at + 1)
        return logits


def pictures(seed: int, count: int) -> Images[NDArray[Any]] | None:
    """Of 16 x 16."""
    return squares(np.random.default_rng(seed).integers(0, 256, (count, 3, 16, 16)).astype(np.uint8))
