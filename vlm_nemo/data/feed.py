"""One reader a replica: the first rank reads and decodes, the others get what they need of it, and no more.

    stage      tensor rank 0                     its tensor-parallel peers
    first      has the Loader; sends             account, positions, tokens, pixels (or features)
    middle     account, positions                account, positions
    last       account, positions, labels        account, positions, labels
    only one   has the Loader; sends             all of it

With several context ranks the table is that of each, all of whose ranks have the whole row; the first one has the
Loader and hands all of it to the first ranks of the others.

The account is what every rank books (the step's counts and drops, the loader's state); positions stands for positions,
segment bounds, how many labels each segment has and the images' places, which layers may need everywhere. On the wire:
JSON, then safetensors. An error of the reader goes the same way, so that all ranks of the replica raise it and none
waits for ever.

All of it runs in the caller's thread, between two steps, so it shares the groups' order with the model's collectives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.sample import Drop
from vlm_nemo.runtime import exchange, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch, UserError

NO_TOKEN = -1
"""Stands for every token where none are needed: it is no placeholder and no word."""
_PIXELS = "images.patches"
_COUNTS = "segment_labels"
_EVERYWHERE = ("positions", "cu_seqlens", _COUNTS, *(f"images.{f.name}" for f in fields(Images) if f.name != "patches"))
_FIRST = ("tokens", _PIXELS, "features")
_LAST = ("labels",)


class Feed:
    """A Loader's next() for every rank of a replica, called by all of them together."""

    loader: Loader | None
    """On the reader only."""
    wait_s: float
    """Seconds that the last next() took: waiting for the reader's rows, and handing them on."""

    def __init__(self, build: Callable[[], Loader], ranks: Ranks) -> None:
        """build: makes the replica's Loader, on its reader only; the others wait. Called by all ranks of the job.

        Raises what it raises, on every rank of the replica.
        """
        self._ranks = ranks
        self._alone = ranks.tensor * ranks.pipeline * ranks.context == 1
        self._reader = ranks.reader
        self._head = ranks.first_stage and ranks.tensor_rank == 0  # of its context rank
        self.wait_s = 0.0
        self.loader = None
        error: BaseException | None = None
        if self._reader:
            try:
                self.loader = build()
            except BaseException as caught:
                error = caught
        # The first index of many tars takes longer than a collective waits
        groups.wait_for_all(failed=error is not None)
        self._agree({}, {}, error)

    def next(self) -> StepData:
        """The next step. Raises the reader's error on every rank of the replica."""
        started = time.perf_counter()
        data: StepData | None = None
        error: BaseException | None = None
        if self.loader is not None:
            try:
                data = self.loader.next()
            except BaseException as caught:
                error = caught
        if not self._alone or error is not None:
            data = self._share(data, error)
        assert data is not None
        self.wait_s = time.perf_counter() - started
        return data

    def close(self) -> None:
        """End the reader's threads."""
        if self.loader is not None:
            self.loader.close()

    def _share(self, data: StepData | None, error: BaseException | None) -> StepData:
        account, parts = self._agree(_account(data) if data else {}, _parts(data) if data else {}, error)
        if self._ranks.first_stage and self._ranks.tensor > 1:
            names = _FIRST + _LAST if self._ranks.last_stage else _FIRST
            sent = exchange.broadcast_bytes(_pack({}, parts, names) if self._head else None, groups.tensor_group())
            parts |= {} if self._head else _unpack(sent)[1]
        if self._ranks.pipeline > 1:
            parts |= self._labels(parts)
        return data if data is not None else _rebuild(account, parts)

    def _agree(
        self, account: dict[str, Any], parts: dict[str, Tensor], error: BaseException | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hand the account on to the replica, or the error that took its place."""
        told = {"error": [isinstance(error, UserError), _words(error)]} if error is not None else account
        if self._head and self._ranks.context > 1:
            found = exchange.broadcast_bytes(_pack(told, parts) if self._reader else None, groups.context_group())
            told, parts = (told, parts) if self._reader else _unpack(found)
        if self._ranks.tensor * self._ranks.pipeline > 1:
            sent = _pack(told, parts, _EVERYWHERE) if self._head else None
            found = exchange.broadcast_bytes(sent, groups.replica_group())
            told, parts = (told, parts) if self._head else _unpack(found)
        if error is not None:
            raise error
        if "error" in told:
            by_user, words = told["error"]
            raise UserError(words) if by_user else RuntimeError(f"the replica's reader failed: {words}")
        return told, parts

    def _labels(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the head to the last stage's first rank, then to its peers."""
        sent = None
        if self._head:
            exchange.send_bytes(_pack({}, parts, _LAST), groups.last_stage_rank())
        if not self._ranks.last_stage:
            return {}
        if self._ranks.tensor_rank == 0:
            sent = exchange.receive_bytes(dist.get_process_group_ranks(groups.replica_group())[0])
        if self._ranks.tensor > 1:
            sent = exchange.broadcast_bytes(sent, groups.tensor_group())
        assert sent is not None
        return _unpack(sent)[1]


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _account(data: StepData) -> dict[str, Any]:
    """All but the tensors."""
    account = {field.name: getattr(data, field.name) for field in fields(data) if field.name != "batches"}
    account["batches"] = [
        {"samples": batch.samples, "used_tokens": batch.used_tokens, "length": len(batch.tokens)}
        for batch in data.batches
    ]
    return account


def _parts(data: StepData) -> dict[str, Tensor]:
    names = (*_EVERYWHERE, *_FIRST, *_LAST)
    found = {f"{i}.{name}": attrgetter(name)(batch) for i, batch in enumerate(data.batches) for name in names}
    found |= {f"{i}.{_COUNTS}": batch.supervised_by_segment() for i, batch in enumerate(data.batches)}
    return {name: part for name, part in found.items() if part is not None}  # most rows have no shares, no features


def _rebuild(account: dict[str, Any], parts: dict[str, Tensor]) -> StepData:
    """A step as this rank needs it: what was not sent stands for nothing."""
    batches = []
    for i, batch in enumerate(account.pop("batches")):
        length = batch.pop("length")
        batches.append(
            PackedBatch(
                tokens=parts.get(f"{i}.tokens", torch.full((length,), NO_TOKEN)),
                labels=parts.get(f"{i}.labels", torch.full((length,), IGNORE_INDEX)),
                positions=parts[f"{i}.positions"],
                cu_seqlens=parts[f"{i}.cu_seqlens"],
                features=parts.get(f"{i}.features"),
                segment_labels=parts[f"{i}.segment_labels"],
                images=Images(
                    patches=parts.get(f"{i}.{_PIXELS}", torch.empty(0, 0, dtype=torch.uint8)),
                    **{name.removeprefix("images."): parts.get(f"{i}.{name}") for name in _EVERYWHERE if "." in name},
                ),
                **batch,
            )
        )
    for name in ("planned_drops", "local_drops"):
        account[name] = [Drop(*drop) for drop in account[name]]
    return StepData(batches=batches, **account)


def _pack(account: dict[str, Any], parts: dict[str, Tensor], names: tuple[str, ...] | None = None) -> bytes:
    """Eight bytes that say how long the JSON is, the JSON, the tensors (of these names; None: all)."""
    from safetensors.torch import save

    words = json.dumps(account).encode()
    chosen = {key: part for key, part in parts.items() if names is None or key.split(".", 1)[1] in names}
    return len(words).to_bytes(8, "little") + words + save(chosen)


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load

    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), load(data[end:])
