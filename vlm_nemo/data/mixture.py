"""In which order samples come: a pure function of (seed, position). Nothing is stored, nothing runs out.

Positions 0, 1, 2, … go on for ever, over all ranks, and each source walks through a fresh permutation of its records
every epoch of its own. Whose turn it is, is said in one of two ways:

    weights   sources take turns by weight, spread as evenly as possible
    counts    a cycle of the blend has so many samples of each source, in one permutation of the whole cycle, another
              one every cycle; unshuffled, a cycle goes through the sources one after another
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.config import SourceConfig
from vlm_nemo.types import UserError

BLOCK = 4096
"""Positions after which the turns of weights repeat: shares are exact to 1/4096."""
_ROUNDS = 6


class Place(NamedTuple):
    """Where a sample comes from."""

    source: str
    epoch: int
    """How often the source has been gone through."""
    record: int


def drawn(sources: Mapping[str, SourceConfig]) -> list[str]:
    """Names of the sources that are drawn from. Raises UserError for shares that make no sense, alone or together."""
    for name, source in sources.items():
        said = {key: getattr(source, key) for key in ("weight", "epochs", "samples")}
        said = {key: value for key, value in said.items() if value is not None}
        if len(said) > 1 and source.weight != 0:  # a weight of 0 leaves it out, whatever else it has
            raise UserError(f"data.sources.{name} has {' and '.join(said)}; set all but one to null")
        for key, value in said.items():
            if not 0 <= value < float("inf"):
                raise UserError(f"data.sources.{name}.{key}={value} must be a number of at least 0")
    sources = {name: source for name, source in sources.items() if source.weight != 0}
    blend = _is_blend(sources)
    if blend and (
        left := [name for name, source in sources.items() if source.epochs is None and source.samples is None]
    ):
        other = next(name for name in sources if name not in left)
        raise UserError(
            f"data.sources.{left[0]} has {'a weight' if sources[left[0]].weight is not None else 'no share'}, "
            f"data.sources.{other} epochs or samples; give all of them weights, or all of them epochs or samples"
        )
    names = [name for name, source in sources.items() if _share(source, blend) > 0]
    if not names:
        raise UserError("data.sources has no source with a share above 0; add data.sources.NAME.path=DIR")
    return names


def _is_blend(sources: Mapping[str, SourceConfig]) -> bool:
    left_in = [source for source in sources.values() if source.weight != 0]
    return any(source.epochs is not None or source.samples is not None for source in left_in)


def _share(source: SourceConfig, blend: bool) -> float:
    if blend:
        return source.epochs or source.samples or 0
    return 1.0 if source.weight is None else source.weight


def build_mixture(
    sources: Mapping[str, SourceConfig], records: Mapping[str, int], *, seed: int, shuffle: bool
) -> Mixture:
    """The order that the configuration asks for; records: how many each source of `drawn` holds."""
    if not _is_blend(sources):
        weights = {name: _share(sources[name], False) for name in records}
        return Mixture(records, weights, seed=seed, shuffle=shuffle)
    counts = {}
    for name, n in records.items():
        source = sources[name]
        counts[name] = source.samples if source.samples is not None else round((source.epochs or 0) * n)
        if counts[name] < 1:
            raise UserError(f"data.sources.{name}.epochs={source.epochs} of {n} records is not one sample; raise it")
    return Mixture(records, counts=counts, seed=seed, shuffle=shuffle)


class Mixture:
    """The order of samples over several sources."""

    identity: dict[str, Any]
    """All that the order depends on: plain data, to be compared with what another run had."""

    def __init__(
        self,
        records: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        counts: Mapping[str, int] | None = None,
        seed: int,
        shuffle: bool,
    ) -> None:
        """records: how many each source holds; weights: share of each, or counts: samples of each in one cycle."""
        shares: Mapping[str, float] = counts if counts is not None else weights if weights is not None else {}
        self._names = [name for name in records if shares[name] > 0]
        if not self._names:
            raise ValueError("no source has a share above 0")
        self._records = [records[name] for name in self._names]
        self._seed = seed
        self._shuffle = shuffle
        self.identity = {
            "seed": seed,
            "shuffle": shuffle,
            "shares": "weights" if counts is None else "counts",
            "sources": {name: [records[name], shares[name]] for name in self._names},
        }
        self._counts = [counts[name] for name in self._names] if counts is not None else None
        if self._counts is not None:
            self._starts = [0, *accumulate(self._counts)]
        else:
            self._turns, self._before, self._per_block = _schedule([shares[name] for name in self._names])

    @property
    def cycle(self) -> int | None:
        """Samples in one cycle of the blend; None where sources take turns by weight."""
        return None if self._counts is None else self._starts[-1]

    def __getitem__(self, position: int) -> Place:
        return self.places(position, 1)[0]

    def places(self, start: int, count: int) -> list[Place]:
        """Positions start … start + count - 1."""
        source, nth = self._draw(np.arange(start, start + count, dtype=np.int64))
        records = np.array(self._records)[source]
        epoch, index = np.divmod(nth, records)
        if self._shuffle:
            pairs = np.stack((source, epoch))
            for which, when in np.unique(pairs, axis=1).T.tolist():
                chosen = (source == which) & (epoch == when)
                keys = _round_keys(self._seed, self._names[which], when)
                index[chosen] = permute(index[chosen], self._records[which], keys)
        names = [self._names[i] for i in source.tolist()]
        return [Place(*place) for place in zip(names, epoch.tolist(), index.tolist(), strict=True)]

    def _draw(self, position: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whose turn each position is, and the how manieth of that source since position 0."""
        if self._counts is None:
            block, slot = np.divmod(position, len(self._turns))
            source = self._turns[slot]
            return source, block * self._per_block[source] + self._before[slot]
        cycle, place = np.divmod(position, self._starts[-1])
        if self._shuffle:
            for c in np.unique(cycle).tolist():
                # A name that no source can have
                keys = _round_keys(self._seed, "/", c)
                place[cycle == c] = permute(place[cycle == c], self._starts[-1], keys)
        source = np.searchsorted(np.array(self._starts[1:]), place, side="right").astype(np.int64)
        return source, cycle * np.array(self._counts)[source] + place - np.array(self._starts)[source]


def _schedule(weights: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Whose turn each slot of a block is, how many turns that source had before in the block, and turns a block.

    [1, 1, 2] -> turns like [2, 0, 2, 1, …]: at every slot the source that is furthest behind its share goes.
    """
    if len(weights) == 1:
        return np.array([0]), np.array([0]), np.array([1])
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
    return np.array(turns), np.array(before), np.array(per_block)


@lru_cache(maxsize=256)
def _round_keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(index: NDArray[np.int64], n: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation of 0 … n-1 in constant memory, of many indices at once: a Feistel network, walked until it lands
    below n."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)
    low, high = index.astype(np.uint64) & low_mask, index.astype(np.uint64) >> shift
    for i in range(0, _ROUNDS, 2):
        low ^= _mix(high, keys[i]) & low_mask
        high ^= _mix(low, keys[i + 1]) & high_mask
    found = (high << shift | low).astype(np.int64)
    outside = found >= n
    if outside.any():
        found[outside] = permute(found[outside], n, keys)
    return found


def _mix(value: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    value = (value ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    value = (value ^ value >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
    return value >> np.uint64(32)
