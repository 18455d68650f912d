"""Measure the token lengths of a prepared source for one tokenizer and template, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.convert import sha256
from vlm_nemo.data.layout import ImageSpec, count_tokens
from vlm_nemo.data.lengths import fingerprint, lengths_path, measure, read_lengths, reason_of, write_lengths
from vlm_nemo.data.sample import Record, SampleError
from vlm_nemo.data.shards import ShardReader, index_path
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


@dataclass(frozen=True, kw_only=True)
class LengthsTask:
    """What a process needs to measure one shard."""

    number: int
    tar: Path
    records: int
    tokenizer: str
    """Folder."""
    template: str
    fingerprint: str
    before: dict[str, Any] | None
    """What an earlier run noted for this shard and fingerprint."""


def check_template(name: str) -> None:
    """Raises UserError if there is no such template."""
    if name not in TEMPLATES:
        raise UserError(f"template={name} is unknown; choose one of {', '.join(TEMPLATES)}")


def tokens_of(folder: str, template: str) -> str:
    """The fingerprint of a tokenizer and a template. Raises UserError if there is no such tokenizer."""
    return fingerprint(_tokenizer(folder), TEMPLATES[template])


def measure_shard(task: LengthsTask) -> tuple[int, dict[str, Any]]:
    """Write a shard's lengths, unless they are there; returns the shard's number and a note for the manifest.

    {"sha256", "tokens": of the texts that can be used, "unusable": {reason: n}, "reused"}
    """
    path = lengths_path(task.tar, task.fingerprint)
    if task.before is not None and path.is_file():
        return task.number, {**task.before, "reused": True}
    lengths = measure(_records(task.tar), _tokenizer(task.tokenizer), TEMPLATES[task.template])
    if len(lengths) != task.records:
        raise UserError(f"shard {task.tar} holds {len(lengths)} records, not {task.records}; prepare it again")
    write_lengths(path, lengths)
    unusable = Counter(reason_of(length) for length in lengths[lengths < 0].tolist())
    tokens = int(np.maximum(lengths, 0).sum(dtype=np.int64))
    return task.number, {"sha256": sha256(path), "tokens": tokens, "unusable": dict(sorted(unusable.items()))}


def _records(tar: Path) -> Iterator[Record | SampleError]:
    shard = ShardReader(tar)
    for number in range(len(shard)):
        try:
            yield shard.record(number)
        except SampleError as error:
            yield error


@lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Tokenizer:
    """A process measures many shards with the same one."""
    return Tokenizer(folder)


def sample_lengths(folder: Path, manifest: dict[str, Any], fingerprint: str, spec: ImageSpec, limit: int) -> np.ndarray:
    """int64: tokens, images included, of about `limit` usable records from shards all over a source.

    Empty if the source was not measured for that fingerprint.
    """
    shards = [shard for shard in manifest["shards"] if shard["records"]]
    per_shard = sum(shard["records"] for shard in shards) / max(1, len(shards))
    step = max(1, int(len(shards) * per_shard / limit))
    found = [np.zeros(0, dtype=np.int64)]
    for shard in shards[::step]:
        text = read_lengths(lengths_path(folder / shard["name"], fingerprint), shard["records"])
        if text is not None:
            lengths = text + image_tokens(folder / shard["name"], spec)
            found.append(lengths[text >= 0][: 2 * limit])
    return np.concatenate(found)


def image_tokens(tar: Path, spec: ImageSpec) -> np.ndarray:
    """[records] int64: placeholders of all images of each record of a shard."""
    with safe_open(index_path(tar), framework="np") as index:
        start, width, height = (index.get_tensor(f"image_{name}") for name in ("start", "width", "height"))
    sizes = zip(width.tolist(), height.tolist(), strict=True)
    ends = np.cumsum([0, *(count_tokens(spec, size) for size in sizes)], dtype=np.int64)
    return ends[start[1:]] - ends[start[:-1]]
