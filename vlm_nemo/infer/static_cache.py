"""What backends with a cache of fixed size share: from rows to graph inputs. No torch here.

    cache [slots, kv_heads, capacity, d] a layer

A prompt runs alone, on the view of its own slot; everything that decodes runs together, on the one contiguous range
of slots that holds it. A slot inside that range that has no row writes a dummy key to its last place: a sequence
that still grows writes its own there before any mask shows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.bundle import Bundle
from vlm_nemo.types import Images


class StaticCacheBackend(ABC):
    """A `Backend` (backend.py) over an export's two graphs; a subclass runs them."""

    def __init__(self, bundle: Bundle, slots: int) -> None:
        self.bundle = bundle
        self.slots = slots
        self.capacity = bundle.capacity
        self._embedding = bundle.embedding()

    @abstractmethod
    def embed_images(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """[n, 3, S, S] -> [n, T, D] in the bundle's storage."""

    @abstractmethod
    def step(
        self,
        first: int,
        embeds: NDArray[Any],
        positions: NDArray[np.int64],
        write: NDArray[np.int64],
        last: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run the language graph on slots first … first + B - 1 and update their cache.

        embeds: [B, S, D] in storage; positions: [B, S]; write: [B], where row b's first token goes; last: [B], whose
        logits are wanted. Returns [B, V].
        """

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `Backend.run`."""
        for row in rows:
            end = row.start + len(row.tokens)
            if not row.tokens or not 0 <= row.slot < self.slots or end > self.capacity:
                raise ValueError(
                    f"slot {row.slot} of {self.slots}: {len(row.tokens)} tokens behind {row.start} of {self.capacity}"
                )
        if len({row.slot for row in rows}) != len(rows):
            raise ValueError(f"rows share a slot: {[row.slot for row in rows]}")
        # Everything that can be refused is, before any cache is touched
        embeds = [self.embed(row.tokens, self._pixels(row.images)) for row in rows]
        logits = np.empty((len(rows), self.bundle.vocab_size), dtype=np.float32)
        single = [i for i, row in enumerate(rows) if len(row.tokens) == 1]
        for i, row in enumerate(rows):
            if len(row.tokens) > 1:
                positions = row.start + np.arange(len(row.tokens), dtype=np.int64)
                logits[i] = self.step(
                    row.slot, embeds[i][None], positions[None], positions[:1], np.array([len(positions) - 1])
                )[0]
        if single:
            self._decode(rows, embeds, single, logits)
        return logits

    def _decode(
        self, rows: Sequence[Row], embeds: list[NDArray[Any]], single: list[int], logits: NDArray[np.float32]
    ) -> None:
        """The rows of one token, together."""
        first = min(rows[i].slot for i in single)
        count = max(rows[i].slot for i in single) - first + 1
        batch = np.zeros((count, 1, self.bundle.hidden_size), dtype=self.bundle.storage)
        positions = np.zeros((count, 1), dtype=np.int64)
        write = np.full(count, self.capacity - 1, dtype=np.int64)
        for i in single:
            at = rows[i].slot - first
            batch[at], positions[at], write[at] = embeds[i], rows[i].start, rows[i].start
        out = self.step(first, batch, positions, write, np.zeros(count, dtype=np.int64))
        for i in single:
            logits[i] = out[rows[i].slot - first]

    def _pixels(self, images: Images[NDArray[Any]] | None) -> NDArray[np.uint8] | None:
        """[n, 3, S, S]: what the vision graph takes, from an image's patches."""
        if images is None:
            return None
        (rows, columns), patch = self.bundle.image.grid, self.bundle.image.patch
        patches = images.patches.reshape(images.count, rows, columns, patch, patch, 3)
        return patches.transpose(0, 5, 1, 3, 2, 4).reshape(images.count, 3, rows * patch, columns * patch)

    def embed(self, tokens: Sequence[int], images: NDArray[np.uint8] | None) -> NDArray[Any]:
        """[S, D]: the tokens' embeddings, with those of the images [n, 3, S, S] in their placeholders' places."""
        ids = np.asarray(tokens, dtype=np.int64)
        places = ids == self.bundle.image_token
        count = 0 if images is None else len(images)
        expected = count * self.bundle.image_tokens
        if places.sum() != expected:
            raise ValueError(
                f"{places.sum()} image placeholders but {count} images of {self.bundle.image_tokens} embeddings "
                f"({expected}); they must be equal"
            )
        embeds = self._embedding[np.where(places, 0, ids)]
        if images is not None and count:
            embeds[places] = self.embed_images(images).reshape(expected, -1)
        return embeds
