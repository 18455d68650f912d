"""Measure the token lengths of a prepared source for one tokenizer and template, shard by shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file

from vlm_nemo.data.chat import TEMPLATES, check_names
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.images import count_tokens, vision_cost
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.lengths import COLUMN, fingerprint, lengths_path, measure, reason_of, write_lengths
from vlm_nemo.data.prepare.convert import sha256
from vlm_nemo.data.prepare.pool import Pool
from vlm_nemo.data.prepare.progress import Meter
from vlm_nemo.data.prepare.source_manifest import Manifest, add_lengths, save
from vlm_nemo.data.sample import Record, SampleError
from vlm_nemo.data.storage.shards import ShardReader, index_path
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

SAVE_SECONDS = 5.0
"""How often the manifest is written on the way."""


@dataclass(frozen=True, kw_only=True)
class LengthsTask:
    """What a process needs to measure one shard."""

    number: int
    tar: Path
    records: int
    tokenizer: str
    """Folder."""
    template: str
    layout: LayoutConfig
    fingerprint: str
    before: dict[str, Any] | None
    """What an earlier run noted for this shard and fingerprint."""


def check_template(name: str) -> None:
    """Raises UserError if there is no such template."""
    if name not in TEMPLATES:
        raise UserError(f"template={name} is unknown; choose one of {', '.join(TEMPLATES)}")


def fingerprint_of(folder: str, template: str, layout: LayoutConfig) -> str:
    """The fingerprint of a tokenizer, a template and a layout. Raises UserError if there is no such tokenizer, or if it
    lacks a special token of the others."""
    tokenizer = _tokenizer(folder)
    check_names(TEMPLATES[template], layout, tokenizer)
    return fingerprint(tokenizer, TEMPLATES[template], layout)


def measure_shard(task: LengthsTask) -> tuple[int, dict[str, Any]]:
    """Write a shard's lengths, unless they are there; returns the shard's number and a note for the manifest.

    {"sha256", "tokens": of the texts that can be used, "unusable": {reason: n}, "reused"}
    """
    path = lengths_path(task.tar, task.fingerprint)
    if task.before is not None and path.is_file() and sha256(path) == task.before.get("sha256"):
        return task.number, {**task.before, "reused": True}
    lengths = measure(_records(task.tar), _tokenizer(task.tokenizer), TEMPLATES[task.template], task.layout)
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


def measure_source(
    out: Path,
    manifest: Manifest,
    tokenizer: str,
    template: str,
    layout: LayoutConfig,
    pool: Pool,
    console: Console,
) -> None:
    """Measure every shard of a source and note it in its manifest; what was measured before is kept."""
    started = time.monotonic()
    fingerprint = fingerprint_of(tokenizer, template, layout)
    shards = [shard for shard in manifest["shards"] if shard["records"]]
    tasks = [
        LengthsTask(
            number=i,
            tar=out / shard["name"],
            records=shard["records"],
            tokenizer=tokenizer,
            template=template,
            layout=layout,
            fingerprint=fingerprint,
            before=shard.get("lengths", {}).get(fingerprint),
        )
        for i, shard in enumerate(shards)
    ]
    total = sum(shard["records"] for shard in shards)
    reused = 0
    saved = time.monotonic()
    with Meter(console, f"lengths {manifest['source']}", total) as meter:
        for number, note in pool.run(measure_shard, tasks, total):
            again = note.pop("reused", False)
            reused += again
            shards[number]["lengths"] = dict(sorted((shards[number].get("lengths", {}) | {fingerprint: note}).items()))
            meter.advance(shards[number]["records"], 0, reused=again)
            if time.monotonic() - saved > SAVE_SECONDS:
                save(out, manifest)
                saved = time.monotonic()
    add_lengths(manifest, fingerprint, tokenizer, template)
    save(out, manifest)
    summary = manifest["lengths"][fingerprint]
    unusable = ", ".join(f"{n} {reason}" for reason, n in summary["unusable"].items())
    console.print(
        f"{manifest['source']}: {summary['tokens']} tokens of text, template {template}, lengths {fingerprint}"
        + (f"; cannot be used with this tokenizer: {unusable}" if unusable else "")
        + ("; reused as they were" if reused == len(tasks) else f"; {time.monotonic() - started:.1f} s"),
        highlight=False,
        soft_wrap=True,
    )


def sample_lengths(folder: Path, manifest: dict[str, Any], fingerprint: str, spec: ImageSpec, limit: int) -> np.ndarray:
    """int64: tokens, images included, of about `limit` usable records from shards all over a source.

    Empty if the source was not measured for that fingerprint.
    """
    return sample_sizes(folder, manifest, fingerprint, spec, limit)[:, 0]


def sample_sizes(folder: Path, manifest: dict[str, Any], fingerprint: str, spec: ImageSpec, limit: int) -> np.ndarray:
    """[n, 2] int64: the same, and beside the tokens the patches that the vision tower computes."""
    shards = [shard for shard in manifest["shards"] if shard["records"]]
    per_shard = sum(shard["records"] for shard in shards) / max(1, len(shards))
    step = max(1, int(len(shards) * per_shard / limit))
    found = [np.zeros((0, 2), dtype=np.int64)]
    for shard in shards[::step]:
        path = lengths_path(folder / shard["name"], fingerprint)
        if path.is_file():
            text = load_file(path)[COLUMN]
            tokens, patches = image_sizes(folder / shard["name"], spec)
            sizes = np.stack([text + tokens, patches], axis=1)
            found.append(sizes[text >= 0][: 2 * limit])
    return np.concatenate(found)


def image_sizes(tar: Path, spec: ImageSpec) -> tuple[np.ndarray, np.ndarray]:
    """[records] int64 each: tokens that stand for all images of each record of a shard, and patches that the vision
    tower computes of them."""
    with safe_open(index_path(tar), framework="np") as index:
        start, width, height = (index.get_tensor(f"image_{name}") for name in ("start", "width", "height"))
    sizes, bounds = list(zip(width.tolist(), height.tolist(), strict=True)), start.tolist()
    records = [sizes[first:end] for first, end in zip(bounds, bounds[1:], strict=False)]
    tokens, patches = ([of(spec, record) for record in records] for of in (count_tokens, vision_cost))
    return np.array(tokens, dtype=np.int64), np.array(patches, dtype=np.int64)


def mixed_lengths(lengths: Mapping[str, np.ndarray], records: Mapping[str, int]) -> np.ndarray:
    """Lengths (or rows that begin with one) of all sources in proportion to their records, from a sample of each."""
    known = {name: values for name, values in lengths.items() if len(values)}
    if not known:
        return np.zeros(0, dtype=np.int64)
    # As many of each as its share, no more than there are of the one that is short of samples
    unit = min(len(values) / max(1, records[name]) for name, values in known.items())
    rng = np.random.default_rng(0)
    return np.concatenate(
        [rng.permutation(values)[: max(1, round(unit * records[name]))] for name, values in known.items()]
    )
