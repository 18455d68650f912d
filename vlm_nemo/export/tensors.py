"""The weight files of an export: places are reserved first, then one stream of tensors fills them all.

A 7B model never lies in memory: the graphs are built from the configuration alone and reserve a place for every
weight that they name; `fill` then takes the tensors one by one, in whatever order they come, and writes each wherever
it was asked for. A protobuf holds no weights (2 GB is its limit), only offsets into these files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlm_nemo.types import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_ALIGNMENT = 4096
"""ONNX Runtime maps a weight that starts on a page instead of copying it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one tensor goes."""

    source: str
    """Its Hugging Face name."""
    shape: tuple[int, ...]
    """As Hugging Face has it; another one is refused."""
    transposed: bool
    """Written as [in, out], which a MatMul takes, where Hugging Face has [out, in, …]."""
    offset: int
    nbytes: int


@dataclass(kw_only=True)
class TensorFile:
    """A file of tensors in one precision, written in place."""

    path: Path
    precision: str
    end: int = 0
    places: list[Place] = field(default_factory=list)
    constants: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, content) of what is known before any weight."""

    def reserve(self, source: str, shape: Sequence[int], *, transposed: bool = False) -> Place:
        """A place for the tensor `source`, in the file's precision."""
        nbytes = int(torch.Size(shape).numel()) * DTYPES[self.precision].itemsize
        place = Place(
            source=source, shape=tuple(shape), transposed=transposed, offset=self._advance(nbytes), nbytes=nbytes
        )
        self.places.append(place)
        return place

    def constant(self, content: bytes) -> int:
        """The offset of bytes that are written as they are."""
        offset = self._advance(len(content))
        self.constants.append((offset, content))
        return offset

    def _advance(self, nbytes: int) -> int:
        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.end = offset + nbytes
        return offset


def embedding_file(path: Path, source: str, shape: tuple[int, int], precision: str) -> TensorFile:
    """A safetensors file of one tensor, "embedding", that the stream fills like any other place."""
    nbytes = shape[0] * shape[1] * DTYPES[precision].itemsize
    entry = {"dtype": _SAFETENSORS[precision], "shape": list(shape), "data_offsets": [0, nbytes]}
    header = json.dumps({"embedding": entry}).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    place = Place(source=source, shape=shape, transposed=False, offset=len(head), nbytes=nbytes)
    return TensorFile(path=path, precision=precision, end=len(head) + nbytes, places=[place], constants=[(0, head)])


def fill(
    files: Sequence[TensorFile], tensors: Iterable[tuple[str, Tensor]], check_unused: Callable[[str], object]
) -> None:
    """Write every reserved place from the stream.

    check_unused: called with the name of a tensor that no place asks for; raises UserError if it should have one.
    Raises UserError for a tensor that is missing, of another shape, or more than the precision can hold.
    """
    wanted: dict[str, list[tuple[TensorFile, Place]]] = {}
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with file.path.open("wb") as out:
            out.truncate(file.end)
            for offset, content in file.constants:
                out.seek(offset)
                out.write(content)
        for place in file.places:
            wanted.setdefault(place.source, []).append((file, place))
    seen = set()
    for name, tensor in tensors:
        if name not in wanted:
            check_unused(name)
            continue
        seen.add(name)
        for file, place in wanted[name]:
            _write(file, place, tensor)
    if missing := sorted(set(wanted) - seen):
        raise UserError(f"{len(missing)} tensors are missing from the model, among them {', '.join(missing[:3])}")


def _write(file: TensorFile, place: Place, tensor: Tensor) -> None:
    if tuple(tensor.shape) != place.shape:
        raise UserError(
            f"tensor {place.source} is {list(tensor.shape)} but the model's configuration says {list(place.shape)}"
        )
    converted = tensor.detach().to("cpu", DTYPES[file.precision])
    if file.precision == "fp16" and not converted.isfinite().all():
        raise UserError(f"tensor {place.source} exceeds what fp16 can hold; export with precision=bf16")
    if place.transposed:
        converted = converted.flatten(1).t()
    content = converted.contiguous().view(-1).view(torch.uint8).numpy()
    assert content.nbytes == place.nbytes
    with file.path.open("r+b") as out:
        out.seek(place.offset)
        out.write(content.data)
