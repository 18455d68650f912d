"""The tensor files of a checkpoint: pieces of global tensors, each saying where it belongs, in safetensors.

A chunk is elements [start, stop) of one box (boxes.py), flattened: a whole box, or under the distributed optimizer a
data rank's share of it. The header of every file lists its chunks, so a folder of such files is complete by itself,
and any layout can be read from any other: a reader assembles the box it needs from whatever chunks overlap it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_nemo.model.boxes import Box, LocalParameter
from vlm_nemo.train.optim import OptimizerSlice
from vlm_nemo.types import UserError

MOMENTS: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
"""AdamW's running means, as torch names them."""

UNUSED_KIND = "unused"
UNUSED_FILE = "unused.safetensors"
"""Beside the weights: tensors that came with an imported model and that ours has no place for. Their keys begin with
their part, too."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a stored tensor is."""

    kind: str
    """weight | master | exp_avg | exp_avg_sq | unused: came with the model and is kept for who reads it elsewhere"""
    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == math.prod(self.shape)


def weight_chunks(parameters: Iterable[LocalParameter]) -> Iterator[tuple[Chunk, Tensor]]:
    """The weights that this process is the one to write."""
    for local in parameters:
        if local.owner:
            for box, view in local.pieces(local.parameter.data):
                yield _chunk("weight", box, 0, box.numel), view


def optimizer_chunks(
    parameters: Iterable[LocalParameter], slices: Iterable[OptimizerSlice]
) -> Iterator[tuple[Chunk, Tensor]]:
    """The optimizer state that this process is the one to write."""
    by_parameter = {id(p.parameter): p for p in parameters}
    for held in slices:
        local = by_parameter[id(held.parameter)]
        if not (local.model_owner if held.sharded else local.owner):
            continue
        tensors: dict[str, Tensor] = {kind: held.state[kind] for kind in MOMENTS if kind in held.state}
        if held.has_copy:
            tensors["master"] = held.master.data
        for kind, tensor in tensors.items():
            flat = tensor.detach().reshape(-1)
            for box, start, stop, first in _overlaps(local, held.start, held.stop):
                yield _chunk(kind, box, start, stop), flat[first : first + stop - start]


def write(path: Path, chunks: Iterable[tuple[Chunk, Tensor]]) -> Path | None:
    """Write one process's file; None if it has nothing to write."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for number, (chunk, tensor) in enumerate(chunks):
        name = f"{chunk.kind}/{chunk.key}#{number}"
        tensors[name] = alone(tensor.detach().to("cpu").contiguous())
        index[name] = asdict(chunk)
    if not tensors:
        return None
    save_file(tensors, path, metadata={"chunks": json.dumps(index)})
    return path


def alone(tensor: Tensor) -> Tensor:
    """A tensor whose memory is its own, as the format wants it: a view is copied."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def whole_chunk(kind: str, key: str, shape: tuple[int, ...]) -> Chunk:
    """A global tensor in one piece."""
    box = Box(key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape)
    return _chunk(kind, box, 0, math.prod(shape))


def read_unused(weights: Path, skip_parts: Collection[str] = ()) -> list[tuple[Chunk, Tensor]]:
    """The tensors of a checkpoint's UNUSED_FILE, without those of some parts; none if there is no such file."""
    if not (weights / UNUSED_FILE).is_file():
        return []
    with safe_open(weights / UNUSED_FILE, framework="pt") as file:
        index = json.loads(file.metadata()["chunks"])
        found = [(_from_json(entry), file.get_tensor(name)) for name, entry in index.items()]
    return [(chunk, tensor) for chunk, tensor in found if chunk.key.split(".", 1)[0] not in skip_parts]


class Reader:
    """Reads boxes out of a folder of chunk files, whatever layout wrote them."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        self._chunks: dict[tuple[str, str], list[tuple[Chunk, Path, str]]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")):
            file = self._files[path] = safe_open(path, framework="pt")
            for name, entry in json.loads(file.metadata()["chunks"]).items():
                chunk = _from_json(entry)
                self._chunks[chunk.kind, chunk.key].append((chunk, path, name))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Key -> global shape of everything of one kind."""
        return {key: found[0][0].global_shape for (k, key), found in self._chunks.items() if k == kind}

    def parts(self) -> set[str]:
        """Parts of the model (vision, projector, language) that there are weights of."""
        return {key.split(".", 1)[0] for key in self.shapes("weight")}

    def whole(self, kind: str, key: str) -> Tensor:
        """A global tensor, whatever layout wrote it. Raises UserError if it is not all there."""
        shape = self.shapes(kind).get(key, ())
        return self.box(kind, Box(key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape))

    def box(self, kind: str, box: Box) -> Tensor:
        """The values of a box, [box.shape]. Raises UserError if they are not all there or the shapes differ."""
        found = self._chunks.get((kind, box.key), [])
        if not found:
            why = "it is of another model" if kind == "weight" else "other precision or frozen parts"
            raise UserError(f"the checkpoint has no {kind} of {box.key}: {why}")
        out: Tensor | None = None
        filled = 0
        for (offset, shape), parts in _by_box(found).items():
            if parts[0][0].global_shape != box.global_shape:
                raise UserError(
                    f"{box.key} is {list(parts[0][0].global_shape)} in the checkpoint but {list(box.global_shape)} in "
                    "the model; the model's sizes must be the checkpoint's"
                )
            span = _intersection(offset, shape, box)
            if span is None:
                continue
            stored = self._assemble(shape, parts)
            if out is None:
                out = torch.empty(box.shape, dtype=stored.dtype)
            theirs = tuple(slice(a - o, b - o) for (a, b), o in zip(span, offset, strict=True))
            mine = tuple(slice(a - o, b - o) for (a, b), o in zip(span, box.offset, strict=True))
            out[mine] = stored[theirs]
            filled += math.prod(b - a for a, b in span)
        if out is None or filled != box.numel:
            raise UserError(f"the checkpoint holds only {filled} of the {box.numel} elements of {kind} {box.key}")
        return out

    def flat(self, kind: str, local: LocalParameter, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a local parameter's `kind`, flattened."""
        parts = []
        for box, first, last, _ in _overlaps(local, start, stop):
            parts.append(self.box(kind, box).reshape(-1)[first:last])
        return torch.cat(parts) if parts else torch.empty(0)

    def _assemble(self, shape: tuple[int, ...], parts: list[tuple[Chunk, Path, str]]) -> Tensor:
        if len(parts) == 1 and parts[0][0].whole:
            chunk, path, name = parts[0]
            return self._files[path].get_tensor(name).view(shape)
        pieces = sorted(parts, key=lambda part: part[0].start)
        joined = torch.cat([self._files[path].get_tensor(name).reshape(-1) for _, path, name in pieces])
        if joined.numel() != math.prod(shape):
            what = f"{parts[0][0].kind} {parts[0][0].key}"
            raise UserError(f"the checkpoint lacks a part of {what}: a rank's file is missing")
        return joined.view(shape)


def _from_json(entry: dict[str, Any]) -> Chunk:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Chunk(**fields)


def _by_box(found: list[tuple[Chunk, Path, str]]) -> dict[Any, list[tuple[Chunk, Path, str]]]:
    grouped: dict[Any, list[tuple[Chunk, Path, str]]] = defaultdict(list)
    for part in found:
        grouped[part[0].offset, part[0].shape].append(part)
    return grouped


def _intersection(offset: tuple[int, ...], shape: tuple[int, ...], box: Box) -> list[tuple[int, int]] | None:
    spans = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(offset, shape, box.offset, box.shape, strict=True)]
    return spans if all(a < b for a, b in spans) else None


def _overlaps(local: LocalParameter, start: int, stop: int) -> Iterator[tuple[Box, int, int, int]]:
    """Elements [start, stop) of a parameter, box by box: (box, first, last in the box, first in the span)."""
    at = 0
    for box in local.boxes:
        first, last = max(start, at), min(stop, at + box.numel)
        if first < last:
            yield box, first - at, last - at, first - start
        at += box.numel


def _chunk(kind: str, box: Box, start: int, stop: int) -> Chunk:
    return Chunk(
        kind=kind,
        key=box.key,
        global_shape=box.global_shape,
        offset=box.offset,
        shape=box.shape,
        start=start,
        stop=stop,
    )
