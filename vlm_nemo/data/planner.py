"""Decide which samples share which row, on lengths alone, before any record is read or image decoded.

Every replica plans the same global rows, so they need not talk, and any number of them trains on the same batches.
Where it stands is a few integers: the next position of the order, and the positions that wait in the pool.

A record's length lies beside its shard (lengths.py), its images' sizes in the index. A source that has no lengths for
this tokenizer and template is read and encoded here instead: right, but slow, and on every replica.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.encode import Encoder, PlannedSample
from vlm_nemo.data.layout.images import vision_cost
from vlm_nemo.data.lengths import fingerprint, reason_of
from vlm_nemo.data.mixture import Mixture, Place
from vlm_nemo.data.packing import Packer
from vlm_nemo.data.sample import TOO_LONG, Drop, NothingUsable, SampleError
from vlm_nemo.types import UserError

LEAST_IN_A_ROW = 1000
"""Fewer drops one after the other never end a run: the budgets are judged when the step is done."""
AHEAD = 512
"""Places of the order that are looked up at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows of one optimizer step, over all ranks."""

    rows: list[list[PlannedSample]]
    drops: list[Drop]
    """Samples that the plan left out on the way."""
    delay: int
    """The longest that a sample waited for its row: samples that were drawn after it until then."""
    state: dict[str, Any]
    """Where to go on after this step."""

    @property
    def used(self) -> dict[str, int]:
        """Samples in the rows, by source."""
        return dict(Counter(sample.source for row in self.rows for sample in row))

    @property
    def costs(self) -> list[int]:
        """Patches that the vision tower computes, by row."""
        return [sum(sample.cost for sample in row) for row in self.rows]


class Planner:
    """Walks through the order and fills rows."""

    unmeasured: list[str]
    """Sources without lengths."""

    def __init__(
        self,
        encoder: Encoder,
        mixture: Mixture,
        *,
        capacity: int,
        pool: int,
        max_tokens: int,
        vision_capacity: int | None = None,
        names: bool = True,
        patience: Mapping[str, int] | None = None,
    ) -> None:
        """max_tokens: longest sample; capacity, pool, vision_capacity: see Packer; names: give dropped samples the
        names that their shards have, which takes a read each; else their numbers; patience: samples of a source that
        may be dropped with nothing usable between them. A source without may be bad throughout, as long as another one
        has something usable."""
        self._encoder = encoder
        self._mixture = mixture
        # What the samples are, besides their order. Not in it: capacity and pool, the model's limits, augmentation:
        # they may change on the way, as a learning rate may; what follows is packed and changed as they then say
        self._order = mixture.identity | {
            "template": next((n for n, known in TEMPLATES.items() if known == encoder.template), "?"),
            "data": {name: folder.identity for name, folder in encoder.folders.items()},
        }
        self._limit = min(capacity, max_tokens)
        self._max_tokens = max_tokens
        self._vision_limit = vision_capacity
        self._names = names
        self._packer = Packer(capacity, pool, vision_capacity)
        name = fingerprint(encoder.tokenizer, encoder.template, encoder.spec.layout)
        self._text_tokens = {source: folder.text_tokens(name) for source, folder in encoder.folders.items()}
        self.unmeasured = [source for source, lengths in self._text_tokens.items() if lengths is None]
        self._waiting: dict[int, PlannedSample] = {}
        self._ahead: deque[Place] = deque()
        self._position = 0
        self._drops: list[Drop] = []
        self._patience = patience or {}
        self._records = {source: len(folder) for source, folder in encoder.folders.items()}
        self._in_a_row = Counter[str]()

    def lengths(self, count: int) -> list[int]:
        """Tokens of the first `count` samples of the order, 0 for one that cannot be used; empty if not all sources
        were measured. Nothing is read but indexes."""
        measured = {source: tokens for source, tokens in self._text_tokens.items() if tokens is not None}
        if self.unmeasured:
            return []
        encoder, found = self._encoder, []
        for source, _, record in self._mixture.places(0, count):
            text = int(measured[source][record])
            images = encoder.image_tokens(encoder.folders[source].sizes(record))
            found.append(text + images if text >= 0 and text + images <= self._max_tokens else 0)
        return found

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if it belongs to another order of samples."""
        _compare(state["order"], self._order)
        for position in state["pool"]:
            self._admit(position, self._mixture[position])
        self._position = int(state["position"])
        self._ahead.clear()

    def step(self, rows: int) -> Plan:
        """Plan so many rows."""
        planned, delay = [], 0
        for _ in range(rows):
            while not self._packer.full:
                if not self._ahead:
                    self._ahead.extend(self._mixture.places(self._position, AHEAD))
                self._admit(self._position, self._ahead.popleft())
                self._position += 1
            row = [self._waiting.pop(position) for position in self._packer.pop()]
            delay = max(delay, self._position - 1 - row[0].position)  # the oldest comes first
            planned.append(row)
        drops, self._drops = self._drops, []
        state = {"position": self._position, "pool": self._packer.items, "order": self._order}
        return Plan(rows=planned, drops=drops, delay=delay, state=state)

    def _admit(self, position: int, place: Place) -> None:
        """Put into the pool; or drop."""
        try:
            sample = self._measure(position, place)
        except SampleError as error:
            name = self._encoder.name(place.source, place.record) if self._names else f"record {place.record}"
            self._drops.append(Drop(place.source, error.reason, name))
            self._in_a_row[place.source] += 1
            if self._is_hopeless(place.source):
                raise NothingUsable(
                    f"{self._in_a_row.total()} samples in a row had to be dropped, the last one "
                    f"{self._drops[-1].key} of {place.source}: {error}",
                    self._drops,
                ) from None
            return
        self._in_a_row.clear()
        self._packer.add(position, sample.length, sample.cost)
        self._waiting[position] = sample

    def _is_hopeless(self, source: str) -> bool:
        """Whether this source's patience is at its end, or all sources were gone through and nothing was usable."""
        if self._in_a_row[source] >= self._patience.get(source, sys.maxsize):
            return True
        gone_through = all(self._in_a_row[name] >= records for name, records in self._records.items())
        return gone_through and self._in_a_row.total() >= LEAST_IN_A_ROW

    def _measure(self, position: int, place: Place) -> PlannedSample:
        source, epoch, record = place
        spec = self._encoder.spec
        sizes = self._encoder.folders[source].sizes(record)
        lengths = self._text_tokens[source]
        if lengths is not None:
            length, encoded = int(lengths[record]), None
            if length < 0:
                raise SampleError(reason_of(length), "found when its length was measured")
            length += self._encoder.image_tokens(sizes)
        else:
            encoded = self._encoder.text(source, record)
            length = len(encoded.tokens)
        if length > self._limit:
            raise SampleError(
                TOO_LONG,
                f"{length} tokens, the limit is {self._limit} (data.pack.capacity, model.language.max_positions)",
            )
        cost = vision_cost(spec, sizes)
        if self._vision_limit is not None and cost > self._vision_limit:
            raise SampleError(
                TOO_LONG, f"{cost} patches, the limit is {self._vision_limit} (data.pack.vision_capacity)"
            )
        return PlannedSample(position, source, epoch, record, length, cost, encoded)


def _compare(saved: dict[str, Any], order: dict[str, Any]) -> None:
    """Raises UserError that names what is not as it was."""
    for key, value in order.items():
        was = saved.get(key)
        if was == value:
            continue
        if key == "data" and isinstance(was, dict):
            names = [name for name in value if was.get(name) != value[name]]
            what = (
                f"the data of {', '.join(f'data.sources.{name}' for name in names)} is not what the run began with: "
                "other shards or tars, though as many records; bring them back (they may lie elsewhere)"
            )
        else:
            what = f"the checkpoint's data order has {key}={was}, this run {key}={value}; go back to it"
        raise UserError(
            f"{what}, or start a new run from the checkpoint's weights (checkpoint=DIR and another run_dir)"
        )
