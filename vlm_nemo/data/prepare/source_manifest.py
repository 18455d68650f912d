"""The manifest.json of a prepared source: what an earlier run left, what this one has done, written atomically.

    {"format", "source", "kind", "complete", "seen", "records", "images", "bytes", "dropped": {reason: n},
     "filtered": {rule: n}, "excluded": {"records", "sha256", …}, "lengths": {fingerprint: {"tokenizer", "template",
     "tokens", "unusable": {reason: n}}},
     "shards": [{"name", "records", "images", "bytes", "sha256", "index_sha256", "input", "dropped", "names",
                 "filtered", "lengths": {fingerprint: {"sha256", "tokens", "unusable"}}}]}

`records` and `images` are those that remain; a shard's own include the duplicates that are passed over.
`seen == records + all dropped`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_nemo.data.ledger import Account
from vlm_nemo.data.sample import DUPLICATE, UNWANTED
from vlm_nemo.data.storage.shards import FORMAT, MANIFEST

Manifest = dict[str, Any]
Entries = dict[str, dict[str, Any]]
"""Shards by name."""


def read_earlier(folder: Path) -> Manifest:
    """What an earlier run wrote; one that cannot be read, or is of another version, counts as none."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] == FORMAT and all(isinstance(shard["name"], str) for shard in content["shards"]):
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"shards": []}


def entries_of(manifest: Manifest) -> Entries:
    """{name: entry} of a manifest's shards."""
    return {shard["name"]: shard for shard in manifest["shards"]}


def build(name: str, kind: str, entries: Iterable[dict[str, Any]], earlier: Manifest, *, complete: bool) -> Manifest:
    """The manifest of these shards, duplicates not looked for yet; what `earlier` says of lengths is kept."""
    shards = sorted(entries, key=lambda shard: str(shard["name"]))
    dropped = Counter[str]()
    filtered = Counter[str]()
    for shard in shards:
        dropped.update(shard["dropped"])
        filtered.update({rule: tally["count"] for rule, tally in shard.get("filtered", {}).items()})
    records = sum(shard["records"] for shard in shards)
    manifest = {
        "format": FORMAT,
        "source": name,
        "kind": kind,
        "complete": complete,
        "seen": records + dropped.total(),
        "records": records,
        "images": sum(shard["images"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "dropped": dict(sorted(dropped.items())),
        "filtered": dict(sorted(filtered.items())),
        "lengths": {},
        "shards": shards,
    }
    for fingerprint, known in earlier.get("lengths", {}).items():
        if all(fingerprint in shard.get("lengths", {}) for shard in shards if shard["records"]):
            add_lengths(manifest, fingerprint, known["tokenizer"], known["template"])
    return manifest


def add_lengths(manifest: Manifest, fingerprint: str, tokenizer: str, template: str) -> None:
    """Sum up what its shards say of one tokenizer's lengths."""
    notes = [shard["lengths"][fingerprint] for shard in manifest["shards"] if shard["records"]]
    unusable = Counter[str]()
    for note in notes:
        unusable.update(note["unusable"])
    manifest["lengths"][fingerprint] = {
        "tokenizer": tokenizer,
        "template": template,
        "tokens": sum(note["tokens"] for note in notes),
        "unusable": dict(sorted(unusable.items())),
    }


def add_excluded(manifest: Manifest, excluded: dict[str, Any]) -> None:
    """Take duplicates out of the counts. excluded: {"records", "images", "sha256", …}."""
    manifest["excluded"] = excluded
    manifest["records"] -= excluded["records"]
    manifest["images"] -= excluded["images"]
    if excluded["records"]:
        manifest["dropped"] = dict(sorted((manifest["dropped"] | {DUPLICATE: excluded["records"]}).items()))


def account(manifest: Manifest) -> Account:
    """The source's samples as a ledger counts them, with an example for each reason."""
    examples: dict[str, str] = {}
    for shard in manifest["shards"]:
        for name, reason, detail in shard["names"]:
            examples.setdefault(reason, f"{name}: {detail}")
    return Account(used=manifest["records"], dropped=dict(manifest["dropped"]), examples=examples)


def faults(manifest: Manifest) -> Account:
    """The same, with what the user asked to leave out counted as used: the budget for bad samples is about the rest."""
    whole = account(manifest)
    wanted = {reason: n for reason, n in whole.dropped.items() if reason not in UNWANTED}
    return Account(used=whole.seen - sum(wanted.values()), dropped=wanted, examples=whole.examples)


def save(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)
