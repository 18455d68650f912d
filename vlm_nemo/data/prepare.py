"""`vlm-nemo prepare`: raw data sets to shards with an index and a manifest, and a tokenizer if one is wanted.

What was prepared from the same files is kept, shard by shard, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_nemo.data.bpe import train_tokenizer
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.convert import Pool, Task
from vlm_nemo.data.folders import open_folder
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.data.shards import FORMAT, MANIFEST
from vlm_nemo.types import IMAGE_MARKER, UserError

log = logging.getLogger(__name__)

SAVE_SECONDS = 5.0
"""How often the manifest of an unfinished source is written."""
TOKENIZER = "tokenizer"
LEDGER = "ledger.json"


@dataclass(frozen=True, kw_only=True)
class RawSource:
    """One entry of manifest.yaml."""

    name: str
    kind: str
    where: dict[str, Path]
    options: dict[str, str]
    """The kind's other keys."""
    held_out: bool
    """For evaluation: the tokenizer is not trained on its texts."""


def prepare(cfg: PrepareConfig) -> dict[str, dict[str, Any]]:
    """Convert every source of cfg.manifest to shards under cfg.out; returns {source: its manifest}.

    Samples that cannot be used are logged by name and counted, in each source's manifest and in out/ledger.json.
    Raises UserError if the manifest is wrong, a raw tar is damaged, no sample of a source is left, or more than
    cfg.max_bad_fraction had to be dropped (what was converted is kept: a higher limit goes on from there).
    """
    if cfg.shard_samples < 1 or cfg.workers < 1:
        raise UserError(f"shard_samples={cfg.shard_samples} and workers={cfg.workers} must be at least 1")
    sources = read_manifest(Path(cfg.manifest), cfg.root)
    out = Path(cfg.out)
    console = Console(stderr=True)
    manifests = {}
    with ExitStack() as stack:
        pool = Pool(cfg.workers, stack)
        for source in sources:
            manifests[source.name] = _prepare_source(source, out / source.name, cfg, pool, console)
    ledger = _ledger(manifests)
    (out / LEDGER).write_text(json.dumps(ledger.to_json(), indent=1) + "\n", encoding="utf-8")
    ledger.check(cfg.max_bad_fraction, cfg.min_samples_before_stop, key="max_bad_fraction")
    if cfg.tokenizer_vocab:
        learned = {source.name: manifests[source.name] for source in sources if not source.held_out}
        _prepare_tokenizer(out, learned, cfg.tokenizer_vocab, console)
    return manifests


def read_manifest(path: Path, folder: str | None = None) -> list[RawSource]:
    """Sources of a manifest.yaml; paths are relative to `folder`, else to its `root`, else to where it lies.

    Raises UserError.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"manifest={path} cannot be read: {error}") from None
    sources = _keys(content, ("name", "root", "sources"), ("sources",), str(path))["sources"]
    if not isinstance(sources, dict) or not sources:
        raise UserError(f"{path}: sources names no source")
    root = Path(folder) if folder is not None else path.parent / str(content.get("root") or "")
    found = []
    for name, entry in sources.items():
        where = f"{path}: sources.{name}"
        if "/" in str(name) or str(name) in (TOKENIZER, ".", ".."):
            raise UserError(f"{where} cannot be the name of a folder of shards; choose another")
        kind = str(entry.get("kind")) if isinstance(entry, dict) else "None"
        if kind not in KINDS:
            raise UserError(f"{where}.kind={kind} is unknown; {_nearest(kind, tuple(KINDS))}")
        known = KINDS[kind]
        _keys(entry, ("kind", "held_out", *known.keys), known.needed, where)
        held_out = entry.get("held_out", False)
        if not isinstance(held_out, bool):
            raise UserError(f"{where}.held_out={held_out} must be true or false")
        places = {key: root / str(entry[key]) for key in known.paths if key in entry}
        options = {key: str(entry[key]) for key in known.options if key in entry}
        found.append(RawSource(name=str(name), kind=kind, where=places, options=options, held_out=held_out))
    return found


def _keys(content: Any, known: tuple[str, ...], needed: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a table of {', '.join(known)}")
    for key in content:
        if key not in known:
            raise UserError(f"{where}.{key} is unknown; {_nearest(str(key), known)}")
    for key in needed:
        if key not in content:
            raise UserError(f"{where}.{key} is missing")
    return content


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"


def _prepare_source(source: RawSource, out: Path, cfg: PrepareConfig, pool: Pool, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    units = KINDS[source.kind].list_units(source.where, source.options, cfg.shard_samples, map)
    total = sum(unit.count for unit in units)
    before = _earlier(out / MANIFEST)
    tasks = [
        Task(number=i, tar=out / f"{i:05d}.tar", unit=unit, before=before.get(f"{i:05d}.tar"))
        for i, unit in enumerate(units)
    ]
    entries: dict[int, dict[str, Any]] = {}
    reused = 0
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"prepare {source.name}", total=total)
        for number, entry in pool.run(tasks, total):
            again = entry.pop("reused", False)
            reused += again
            entries[number] = entry
            if not again:
                for name, reason, detail in entry["dropped"]:
                    log.warning("dropped %s %s: %s (%s)", source.name, name, reason, detail)
            progress.advance(bar, units[number].count)
            if time.monotonic() - saved > SAVE_SECONDS:
                # Entries of shards that are still to be looked at stay, or they would be made anew after a break
                _save(out, _manifest(source, before, entries, complete=False))
                saved = time.monotonic()
    manifest = _manifest(source, {}, entries, complete=True)
    if not manifest["records"]:
        raise UserError(
            f"source {source.name}: none of {total} samples can be used ({_tally(manifest['dropped'])}); "
            "the log names each one"
        )
    _save(out, manifest)
    kept = {shard["name"] for shard in manifest["shards"]}
    for old in out.glob("[0-9]*.tar*"):
        if old.name.split(".tar")[0] + ".tar" not in kept or old.name.endswith(".part"):
            old.unlink()
    console.print(
        f"{source.name}: {manifest['records']} samples, {manifest['images']} images, {len(kept)} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB; dropped {_tally(manifest['dropped'])}; "
        + ("reused as it was" if reused == len(tasks) else f"{reused} of {len(tasks)} shards reused")
        + f"; {time.monotonic() - started:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return manifest


def _earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Shard entries of an earlier run by name; one that cannot be read counts as none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {shard["name"]: shard for shard in content["shards"]} if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _manifest(
    source: RawSource, before: dict[str, dict[str, Any]], entries: dict[int, dict[str, Any]], *, complete: bool
) -> dict[str, Any]:
    by_name = before | {entry["name"]: entry for entry in entries.values()}
    shards = [by_name[name] for name in sorted(by_name)]
    dropped = Counter(reason for shard in shards for _, reason, _ in shard["dropped"])
    return {
        "format": FORMAT,
        "source": source.name,
        "kind": source.kind,
        "complete": complete,
        "seen": sum(shard["records"] for shard in shards) + dropped.total(),
        "records": sum(shard["records"] for shard in shards),
        "images": sum(shard["images"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "dropped": dict(sorted(dropped.items())),
        "shards": shards,
    }


def _save(folder: Path, manifest: dict[str, Any]) -> None:
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


def _ledger(manifests: dict[str, dict[str, Any]]) -> Ledger:
    """All sources' samples, in the same form as a training run's ledger."""
    return Ledger.of({name: (m["records"], m["dropped"]) for name, m in manifests.items()})


def _tally(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"


def _prepare_tokenizer(out: Path, manifests: dict[str, dict[str, Any]], vocab: int, console: Console) -> None:
    """Train on what the shards say, unless it was done on the same shards."""
    origin = {"vocab": vocab, "shards": {n: [s["sha256"] for s in m["shards"]] for n, m in manifests.items()}}
    folder = out / TOKENIZER
    note = folder / "origin.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == origin:
        console.print(f"tokenizer: reused as it was ({folder})", highlight=False)
        return

    def texts() -> Iterator[str]:
        for name in manifests:
            shards = open_folder(str(out / name))
            for number in range(len(shards)):
                for message in shards.record(number).messages:
                    yield message["content"].replace(IMAGE_MARKER, "")

    tokens = train_tokenizer(texts(), vocab, folder)
    note.write_text(json.dumps(origin) + "\n", encoding="utf-8")
    console.print(f"tokenizer: {tokens} tokens ({folder})", highlight=False)
