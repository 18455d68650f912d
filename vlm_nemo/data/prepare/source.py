"""Prepare one source: units to shards, duplicates passed over, manifest.json kept up to date on the way."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.prepare.convert import EXAMPLES, Task, convert, sha256
from vlm_nemo.data.prepare.duplicates import exclusion_input, find_duplicates, write_excluded
from vlm_nemo.data.prepare.manifest import RawSource
from vlm_nemo.data.prepare.pool import Pool
from vlm_nemo.data.prepare.progress import Meter
from vlm_nemo.data.prepare.source_manifest import Manifest, add_excluded, build, entries_of, faults, read_earlier, save
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.data.storage.shards import EXCLUDED, ShardReader
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

SAVE_SECONDS = 5.0
"""How often the manifest of an unfinished source is written."""
MANY = 1000
"""Bad samples to see before a run is broken off that cannot come below its limit: a small one shows all its faults."""


def prepare_source(
    source: RawSource, out: Path, cfg: PrepareConfig, pool: Pool, console: Console
) -> Iterator[Manifest]:
    """Yields the manifest as far as it goes (for the ledger), last of all the complete one.

    Raises UserError as `prepare` says.
    """
    started = time.monotonic()
    units = KINDS[source.kind].list_units(source.where, source.options, cfg.shard_samples, pool.map)
    total = sum(unit.count for unit in units)
    earlier = read_earlier(out)
    before = entries_of(earlier)
    tasks = [
        Task(
            number=i,
            tar=out / f"{i:05d}.tar",
            unit=unit,
            before=before.get(f"{i:05d}.tar"),
            filter=source.filter,
        )
        for i, unit in enumerate(units)
    ]
    entries: dict[str, dict[str, Any]] = {}
    limit = cfg.max_bad_fraction if source.max_bad_fraction is None else source.max_bad_fraction
    reused = bad = 0
    saved = time.monotonic()
    try:
        with Meter(console, f"prepare {source.name}", total) as meter:
            for number, entry in pool.run(convert, tasks, total):
                again = entry.pop("reused", False)
                reused += again
                entries[entry["name"]] = entry
                if not again:
                    for name, reason, detail in entry["names"]:
                        log.warning("dropped %s %s: %s (%s)", source.name, name, reason, detail)
                bad += len(entry["names"])
                if bad > max(limit * total, MANY):
                    break  # nothing that comes later can bring it below the limit
                meter.advance(units[number].count, entry["bytes"], reused=again)
                if time.monotonic() - saved > SAVE_SECONDS:
                    # Entries of shards that are still to be looked at stay, or they would be made anew after a break
                    save(out, build(source.name, source.kind, (before | entries).values(), earlier, complete=False))
                    saved = time.monotonic()
    except BaseException:
        if entries:
            with contextlib.suppress(OSError):  # the disk may be full
                save(out, build(source.name, source.kind, (before | entries).values(), earlier, complete=False))
        raise
    manifest = build(source.name, source.kind, entries.values(), earlier, complete=True)
    if bad > max(limit * total, MANY):
        save(out, build(source.name, source.kind, (before | entries).values(), earlier, complete=False))
        yield manifest
        check_budgets({source.name: manifest}, limit, 0, _limit_key(source))
    if source.drop_duplicates:
        add_excluded(manifest, _exclude(out, manifest, earlier))
    else:
        (out / EXCLUDED).unlink(missing_ok=True)
    if not manifest["records"]:
        raise UserError(
            f"source {source.name}: none of {total} samples can be used ({tally(manifest)}); the log names each one"
        )
    save(out, manifest)
    for old in out.glob("[0-9]*.tar*"):
        if old.name.split(".tar")[0] + ".tar" not in entries or old.name.endswith(".part"):
            old.unlink()
    console.print(
        f"{source.name}: {manifest['records']} samples, {manifest['images']} images, {len(entries)} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB; dropped {tally(manifest)}; "
        + ("reused as it was" if reused == len(tasks) else f"{reused} of {len(tasks)} shards reused")
        + f"; {time.monotonic() - started:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    yield manifest


def check_all_budgets(sources: Sequence[RawSource], manifests: Mapping[str, Manifest], cfg: PrepareConfig) -> None:
    """Raises UserError if too many samples of a source, or of all without a limit of their own, had to be dropped."""
    shared = {}
    for source in sources:
        manifest = manifests[source.name]
        if source.max_bad_fraction is None:
            shared[source.name] = manifest
        else:
            limit = source.max_bad_fraction
            check_budgets({source.name: manifest}, limit, cfg.min_samples_before_stop, _limit_key(source))
    check_budgets(shared, cfg.max_bad_fraction, cfg.min_samples_before_stop, "max_bad_fraction")


def check_budgets(manifests: Mapping[str, Manifest], limit: float, min_samples: int, key: str) -> None:
    """The same, for these sources under one limit; key: its name."""
    ledger = Ledger()
    ledger.sources = {name: faults(manifest) for name, manifest in manifests.items()}
    ledger.check(limit, min_samples, key)


def _limit_key(source: RawSource) -> str:
    return "max_bad_fraction" if source.max_bad_fraction is None else f"sources.{source.name}.max_bad_fraction"


def _exclude(out: Path, manifest: Manifest, earlier: Manifest) -> dict[str, Any]:
    """Find the duplicates, unless it was done for the same shards, and write which records to pass over."""
    made_of = exclusion_input(manifest["shards"])
    known = earlier.get("excluded")
    path = out / EXCLUDED
    if known is not None and known.get("input") == made_of and path.is_file() and sha256(path) == known.get("sha256"):
        return dict(known)
    tars = [out / shard["name"] for shard in manifest["shards"]]
    found = find_duplicates(tars, sum(shard["records"] for shard in manifest["shards"]))
    pairs = list(zip(found.records.tolist(), found.firsts.tolist(), strict=True))[:EXAMPLES]
    return {
        "records": len(found.records),
        "images": found.images,
        "sha256": write_excluded(out, found.records),
        "input": made_of,
        "examples": [f"{_name(tars, manifest, again)}: as {_name(tars, manifest, first)}" for again, first in pairs],
    }


def _name(tars: list[Path], manifest: Manifest, number: int) -> str:
    """A record's name in the raw data."""
    for tar, shard in zip(tars, manifest["shards"], strict=True):
        if number < shard["records"]:
            return ShardReader(tar).record(number).source_id
        number -= shard["records"]
    raise IndexError(number)


def tally(manifest: Manifest) -> str:
    """ "3 broken image, 17 filtered (12 min_side=64, 5 min_words=3)"."""
    parts = []
    for reason, n in manifest["dropped"].items():
        rules = ", ".join(f"{count} {rule}" for rule, count in manifest["filtered"].items())
        parts.append(f"{n} {reason}" + (f" ({rules})" if reason == "filtered" else ""))
    return ", ".join(parts) or "none"
