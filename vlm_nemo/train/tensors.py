"""The tensor files of a checkpoint: pieces of global tensors, each saying where it belongs, in safetensors.

A chunk is elements [start, stop) of one box (boxes.py), flattened: a whole box, or under the distributed optimizer a
data rank's share of it. The header of every file lists its chunks, so a folder of such files is complete by itself,
and any layout can be read from any other: a reader assembles the box it needs from whatever chunks overlap it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlm_nemo.model.boxes import Box, LocalParameter
from vlm_nemo.types import UserError

MOMENTS: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
"""AdamW's running means, as torch names them."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types as the headers of safetensors name them."""

UNUSED_KIND = "unused"
UNUSED_FILE = "unused.safetensors"
"""Beside the weights: tensors that came with an imported model and that ours has no place for. Their keys begin with
their part, too."""


class Abandoned(Exception):
    """A file was not finished because nobody wants it any more."""


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


def write(
    path: Path, chunks: Iterable[tuple[Chunk, Tensor]], stopping: Callable[[], bool] = lambda: False
) -> tuple[int, str] | None:
    """Write one process's file and wait until it is on the disk: its size in bytes and its SHA-256.

    Tensors may lie anywhere: they are brought to the CPU one at a time. None, and no file, if there is nothing to
    write.
    stopping: asked before every tensor. Raises Abandoned where it says yes.
    """
    held = list(chunks)
    if not held:
        return None
    # As safetensors does, the widest types come first, so that every tensor begins at a multiple of its own width
    held.sort(key=lambda entry: -entry[1].element_size())
    header: dict[str, Any] = {}
    index: dict[str, Any] = {}
    at = 0
    for number, (chunk, tensor) in enumerate(held):
        name = f"{chunk.kind}/{chunk.key}#{number}"
        index[name] = asdict(chunk)
        span = [at, at := at + tensor.numel() * tensor.element_size()]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    words = json.dumps({"__metadata__": {"chunks": json.dumps(index)}, **header}).encode()
    words += b" " * (-len(words) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(words).to_bytes(8, "little"), words):
            digest.update(piece)
            file.write(piece)
        for _, tensor in held:
            if stopping():
                raise Abandoned(str(path))
            content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(words) + at, digest.hexdigest()


def alone(tensor: Tensor) -> Tensor:
    """A tensor whose memory is its own, as the format wants it: a view is copied."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def whole_chunk(kind: str, key: str, shape: tuple[int, ...]) -> Chunk:
    """A global tensor in one piece."""
    box = Box(key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape)
    return chunk_of(kind, box, 0, math.prod(shape))


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
        parts = [self._span(kind, box, first, last) for box, first, last, _ in overlaps(local.boxes, start, stop)]
        return torch.cat(parts) if parts else torch.empty(0)

    def holds(self, kind: str, box: Box, dtype: torch.dtype) -> bool:
        """Whether every element of a box is stored, as this type."""
        filled = 0
        for chunk, path, name in self._chunks.get((kind, box.key), []):
            span = _intersection(chunk.offset, chunk.shape, box)
            if chunk.global_shape != box.global_shape or not chunk.whole or span is None:
                continue
            if self._files[path].get_slice(name).get_dtype() != DTYPES[dtype]:
                return False
            filled += math.prod(b - a for a, b in span)
        return filled == box.numel

    def files_of_parts(self) -> dict[str, list[str]]:
        """Part -> the files that hold its weights, for the parts whose files hold nothing else."""
        parts_of: dict[Path, set[str]] = defaultdict(set)
        for (kind, key), found in self._chunks.items():
            for _, path, _ in found:
                parts_of[path].add(key.split(".", 1)[0] if kind == "weight" else kind)
        mixed = {part for parts in parts_of.values() if len(parts) > 1 for part in parts}
        return {
            part: sorted(path.name for path, parts in parts_of.items() if part in parts)
            for part in self.parts()
            if part not in mixed
        }

    def _span(self, kind: str, box: Box, first: int, last: int) -> Tensor:
        """Elements [first, last) of a box; no others are read where the box was written as it is."""
        found, at = [], first
        same = [part for part in self._chunks.get((kind, box.key), []) if _is(part[0], box)]
        for chunk, path, name in sorted(same, key=lambda part: part[0].start):
            if chunk.start <= at < (stop := min(chunk.stop, last)):
                stored = self._files[path].get_slice(name)
                if len(stored.get_shape()) == 1:
                    found.append(stored[at - chunk.start : stop - chunk.start])
                else:
                    found.append(self._files[path].get_tensor(name).reshape(-1)[at - chunk.start : stop - chunk.start])
                at = stop
        return torch.cat(found) if at == last else self.box(kind, box).reshape(-1)[first:last]

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


def _is(chunk: Chunk, box: Box) -> bool:
    return (chunk.global_shape, chunk.offset, chunk.shape) == (box.global_shape, box.offset, box.shape)


def overlaps(boxes: Iterable[Box], start: int, stop: int) -> Iterator[tuple[Box, int, int, int]]:
    """Elements [start, stop) of boxes one after the other: (box, first, last in the box, first in the span)."""
    at = 0
    for box in boxes:
        first, last = max(start, at), min(stop, at + box.numel)
        if first < last:
            yield box, first - at, last - at, first - start
        at += box.numel


def chunk_of(kind: str, box: Box, start: int, stop: int) -> Chunk:
    """Elements [start, stop) of a box."""
    return Chunk(
        kind=kind,
        key=box.key,
        global_shape=box.global_shape,
        offset=box.offset,
        shape=box.shape,
        start=start,
        stop=stop,
    )
