"""Decide which samples share which row, on lengths alone, before any image is decoded.

Every rank plans the same global rows, so the ranks need not talk, and any number of them trains on the same batches.
Where it stands is a few integers: the next position of the order, and the positions that wait in the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_nemo.data.chat import Template, encode_conversation
from vlm_nemo.data.folders import Folder
from vlm_nemo.data.layout import ImageSpec, count_tokens
from vlm_nemo.data.mixture import Mixture
from vlm_nemo.data.packing import Packer
from vlm_nemo.data.sample import TOO_LONG, Drop, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

MAX_DROPS_IN_A_ROW = 1000
"""So many samples dropped one after the other mean that the data, not a sample, is wrong."""


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """A sample that has its place in a row; its images are still files."""

    position: int
    source: str
    record: int
    tokens: list[int]
    labels: list[int]
    images: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows of one optimizer step, over all ranks."""

    rows: list[list[PlannedSample]]
    drops: list[Drop]
    """Samples that the plan left out on the way."""
    state: dict[str, Any]
    """Where to go on after this step."""

    @property
    def samples(self) -> int:
        return sum(len(row) for row in self.rows)


class Planner:
    """Walks through the order and fills rows."""

    def __init__(
        self,
        folders: Mapping[str, Folder],
        mixture: Mixture,
        tokenizer: Tokenizer,
        template: Template,
        spec: ImageSpec,
        *,
        capacity: int,
        pool: int,
        max_tokens: int,
        order: dict[str, Any],
    ) -> None:
        """max_tokens: longest sample; order: what the order depends on, kept in the state to be compared."""
        self._folders = folders
        self._mixture = mixture
        self._tokenizer = tokenizer
        self._template = template
        self._spec = spec
        self._limit = min(capacity, max_tokens)
        self._order = order
        self._packer = Packer(capacity, pool)
        self._waiting: dict[int, PlannedSample] = {}
        self._position = 0
        self._drops: list[Drop] = []
        self._in_a_row = 0

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if it belongs to another order of samples."""
        for key, value in self._order.items():
            if state["order"].get(key) != value:
                raise UserError(
                    f"the checkpoint's data order has {key}={state['order'].get(key)}, this run {key}={value}; go back "
                    "to it, or start a new run from the checkpoint's weights (checkpoint=DIR and another run_dir)"
                )
        for position in state["pool"]:
            self._admit(position)
        self._position = int(state["position"])

    def step(self, rows: int) -> Plan:
        """Plan so many rows."""
        planned = []
        for _ in range(rows):
            while not self._packer.full:
                self._admit(self._position)
                self._position += 1
            planned.append([self._waiting.pop(position) for position in self._packer.pop()])
        drops, self._drops = self._drops, []
        state = {"position": self._position, "pool": self._packer.items, "order": self._order}
        return Plan(rows=planned, drops=drops, state=state)

    def name(self, source: str, record: int) -> str:
        """A record's name for logs: shard and member, and its name in the raw data if it can be read."""
        folder = self._folders[source]
        try:
            origin = folder.record(record).source_id
        except SampleError:
            origin = ""
        return f"{folder.key(record)} ({origin})" if origin else folder.key(record)

    def _admit(self, position: int) -> None:
        """Read, encode and put into the pool; or drop."""
        place = self._mixture[position]
        try:
            sample = self._encode(position, place.source, place.record)
        except SampleError as error:
            self._drops.append(Drop(place.source, error.reason, self.name(place.source, place.record)))
            self._in_a_row += 1
            if self._in_a_row >= MAX_DROPS_IN_A_ROW:
                raise UserError(
                    f"{self._in_a_row} samples in a row had to be dropped, the last one "
                    f"{self._drops[-1].key} of {place.source}: {error}"
                ) from None
            return
        self._in_a_row = 0
        self._packer.add(position, len(sample.tokens))
        self._waiting[position] = sample

    def _encode(self, position: int, source: str, number: int) -> PlannedSample:
        record = self._folders[source].record(number)
        image_tokens = [count_tokens(self._spec, size) for size in record.sizes]
        tokens, labels = encode_conversation(record.messages, self._tokenizer, self._template, image_tokens)
        if len(tokens) > self._limit:
            raise SampleError(
                TOO_LONG,
                f"{len(tokens)} tokens, the limit is {self._limit} (data.pack.capacity, model.language.max_positions)",
            )
        return PlannedSample(
            position=position,
            source=source,
            record=number,
            tokens=tokens,
            labels=labels,
            images=len(record.sizes),
        )
