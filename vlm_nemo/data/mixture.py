"""In which order samples come: a pure function of (seed, position). Nothing is stored, nothing runs out.

Positions 0, 1, 2, … go on for ever, over all ranks. Sources take turns by weight, spread as evenly as possible; each
source walks through a fresh permutation of its records every epoch of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from vlm_nemo.types import UserError

BLOCK = 4096
"""Positions after which the turns repeat: shares are exact to 1/4096."""
_ROUNDS = 6
_MASK = (1 << 64) - 1


class Place(NamedTuple):
    """Where a sample comes from."""

    source: str
    epoch: int
    """How often the source has been gone through."""
    record: int


class Mixture:
    """The order of samples over several sources."""

    def __init__(self, records: Mapping[str, int], weights: Mapping[str, float], *, seed: int, shuffle: bool) -> None:
        """records: how many each source holds; weights: share of each, 0 leaves it out. Raises UserError."""
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"data.sources.{name}.weight={weight} must be a number of at least 0")
        self._names = [name for name in records if weights[name] > 0]
        if not self._names:
            raise UserError("data.sources has no source with a weight above 0; add data.sources.NAME.path=DIR")
        self._records = [records[name] for name in self._names]
        self._seed = seed
        self._shuffle = shuffle
        self._turns, self._before, self._per_block = _schedule([weights[name] for name in self._names])

    def __getitem__(self, position: int) -> Place:
        block, slot = divmod(position, len(self._turns))
        source = self._turns[slot]
        nth = block * self._per_block[source] + self._before[slot]
        epoch, index = divmod(nth, self._records[source])
        name = self._names[source]
        if self._shuffle:
            index = permute(index, self._records[source], _round_keys(self._seed, name, epoch))
        return Place(name, epoch, index)


def _schedule(weights: list[float]) -> tuple[list[int], list[int], list[int]]:
    """Whose turn each slot of a block is, how many turns that source had before in the block, and turns a block.

    [1, 1, 2] -> turns like [2, 0, 2, 1, …]: at every slot the source that is furthest behind its share goes.
    """
    if len(weights) == 1:
        return [0], [0], [1]
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    per_block = [max(1, int(share)) for share in exact]
    # Whole turns by largest remainder
    by_remainder = sorted(range(len(weights)), key=lambda i: per_block[i] - exact[i])
    for i in range(BLOCK - sum(per_block)):
        per_block[by_remainder[i % len(weights)]] += 1
    size = sum(per_block)  # above BLOCK only if many tiny weights were raised to one turn
    given = [0] * len(weights)
    turns, before = [], []
    for slot in range(1, size + 1):
        source = max(range(len(weights)), key=lambda i: per_block[i] * slot - given[i] * size)
        turns.append(source)
        before.append(given[source])
        given[source] += 1
    assert given == per_block
    return turns, before, per_block


@lru_cache(maxsize=256)
def _round_keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(index: int, n: int, keys: tuple[int, ...]) -> int:
    """A permutation of 0 … n-1 in constant memory: a Feistel network, walked until it lands below n."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = index & low_mask, index >> low_bits
        for i in range(0, _ROUNDS, 2):
            low ^= _mix(high, keys[i]) & low_mask
            high ^= _mix(low, keys[i + 1]) & high_mask
        index = high << low_bits | low
        if index < n:
            return index


def _mix(value: int, key: int) -> int:
    value = (value ^ key) * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return value >> 32
