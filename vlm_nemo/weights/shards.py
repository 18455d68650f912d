"""Writing: tensors as they come, in files of a bounded size; a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_nemo.train.tensors import alone
from vlm_nemo.types import UserError

Label = TypeVar("Label")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def in_shards(items: Iterable[tuple[Label, Tensor]], limit: int) -> Iterator[list[tuple[Label, Tensor]]]:
    """Runs of tensors of at most `limit` bytes together (a larger tensor stands alone), in their order.

    A run is the caller's until it asks for the next; then it is emptied, so that only one is in memory.
    """
    held: list[tuple[Label, Tensor]] = []
    size = 0
    for label, tensor in items:
        if held and size + tensor.nbytes > limit:
            yield held
            held.clear()
            size = 0
        held.append((label, tensor))
        size += tensor.nbytes
    if held:
        yield held


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of another precision; None and whole numbers stay as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def write_hf(folder: Path, named: Iterable[tuple[str, Tensor]], limit: int) -> dict[str, Tensor]:
    """model.safetensors, or several and their index, as save_pretrained lays them out.

    Returns what was written by name: shapes and types, without values (meta tensors).
    """
    files: list[list[str]] = []
    written: dict[str, Tensor] = {}
    for shard in in_shards(named, limit):
        files.append([name for name, _ in shard])
        written |= {name: tensor.to("meta") for name, tensor in shard}
        save_file(
            {name: alone(tensor.contiguous()) for name, tensor in shard}, _draft(folder, len(files)), {"format": "pt"}
        )
    names = [_final(n, len(files)) for n in range(1, len(files) + 1)]
    for number, name in enumerate(names, 1):
        _draft(folder, number).rename(folder / name)
    if len(files) > 1:
        where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        total = sum(tensor.nbytes for tensor in written.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return written


def _draft(folder: Path, number: int) -> Path:
    """How many files there will be, which is part of their names, is known at the end."""
    return folder / f".{number}.draft"


def _final(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As Hugging Face's files look."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all went well and is removed otherwise.

    Raises UserError if `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists already; name a new folder, or remove that one")
    draft = out.parent / f".{out.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
