"""Convert a unit of raw samples to one shard."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_nemo.data.prepare.filters import Rule, first_refusal
from vlm_nemo.data.raw.unit import RawDrop, Unit
from vlm_nemo.data.sample import FILTERED, ShardSample
from vlm_nemo.data.storage.shards import index_path
from vlm_nemo.data.storage.write import write_shard

EXAMPLES = 3
"""Names kept of the samples that a rule of the filter left out; there may be millions."""


NOT_KEPT = ("sha256", "width", "height")
"""Facts that a filter may ask for, and nobody later: the index has them of the image as it is."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process needs to write one shard."""

    number: int
    tar: Path
    unit: Unit
    before: dict[str, Any] | None
    """The shard's entry in the manifest of an earlier run."""
    filter: tuple[Rule, ...] = ()


def convert(task: Task) -> tuple[int, dict[str, Any]]:
    """Write one shard, unless it was written from the same input already; returns its number and manifest entry."""
    fingerprint = task.unit.fingerprint()
    if task.filter:
        fingerprint = hashlib.sha256(
            "\n".join([fingerprint, *(rule.text for rule in task.filter)]).encode()
        ).hexdigest()
    if task.before is not None and _still_there(task.tar, task.before, fingerprint):
        return task.number, {**task.before, "reused": True}
    drops: list[RawDrop] = []
    filtered: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()

    def samples() -> Iterator[ShardSample]:
        for i, raw in enumerate(task.unit.read()):
            if isinstance(raw, RawDrop):
                drops.append(raw)
                counts[raw.reason] += 1
                continue
            sizes = [(image.width, image.height) for image in raw.images]
            refused = first_refusal(task.filter, raw.messages, sizes, raw.facts) if task.filter else None
            if refused is not None:
                rule, detail = refused
                counts[FILTERED] += 1
                tally = filtered.setdefault(rule.text, {"count": 0, "examples": []})
                tally["count"] += 1
                if len(tally["examples"]) < EXAMPLES:
                    tally["examples"].append(f"{raw.name}: {detail}")
                continue
            counts["records"] += 1
            counts["images"] += len(raw.images)
            yield ShardSample(
                key=f"{task.number:05d}{i:06d}",
                messages=raw.messages,
                kind=raw.kind,
                source_id=raw.name,
                images=raw.images,
                facts={name: value for name, value in raw.facts.items() if name not in NOT_KEPT},
            )

    task.tar.parent.mkdir(parents=True, exist_ok=True)
    write_shard(task.tar, samples())
    entry = {
        "name": task.tar.name,
        "records": counts.pop("records", 0),
        "images": counts.pop("images", 0),
        "bytes": task.tar.stat().st_size,
        "sha256": sha256(task.tar),
        "index_sha256": sha256(index_path(task.tar)),
        "input": fingerprint,
        "dropped": dict(sorted(counts.items())),
        "names": [list(drop) for drop in drops],
    }
    if filtered:
        entry["filtered"] = dict(sorted(filtered.items()))
    return task.number, entry


def _still_there(tar: Path, entry: dict[str, Any], fingerprint: str) -> bool:
    """By the tar's size and the index's bytes: reading every tar again takes as long as to write it. What it
    cannot see, audit=true does (verify.py)."""
    return (
        entry.get("input") == fingerprint
        and tar.is_file()
        and tar.stat().st_size == entry.get("bytes")
        and index_path(tar).is_file()
        and sha256(index_path(tar)) == entry.get("index_sha256")
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
