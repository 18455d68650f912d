"""`vlm-nemo prepare … audit=true`: what is in the data, as tables, as audit/audit.json and as audit/audit.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.layout.images import TYPICAL, count_tokens, tokens_said
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.prepare.advice import Advice, advise, pack_fill, percent
from vlm_nemo.data.prepare.convert import EXAMPLES
from vlm_nemo.data.prepare.duplicates import Copies, count_copies
from vlm_nemo.data.prepare.measure import mixed_lengths, sample_sizes
from vlm_nemo.data.prepare.progress import Meter
from vlm_nemo.data.prepare.rehearsal import RANKS, ROWS, Rehearsal, rehearse
from vlm_nemo.data.prepare.source_manifest import Manifest
from vlm_nemo.data.prepare.survey import POINTS, Survey, percentiles, survey, to_json
from vlm_nemo.data.sample import DUPLICATE, UNWANTED, printable
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.storage.verify import verify
from vlm_nemo.types import UserError

FOLDER = "audit"
ALL = "all sources"
CAPACITIES = (2048, 4096, 8192, 16384)
"""Lengths of a row that most people choose from."""
WIDTH = 140
"""Columns of the tables at least."""
NAMED = 10
"""Damaged shards that the error names."""
LENGTH_SAMPLES = 20_000
"""Lengths a source that are looked at."""


def audit(
    out: Path,
    manifests: Mapping[str, Manifest],
    trained_on: Mapping[str, Manifest],
    fingerprint: str | None,
    spec: ImageSpec,
    cfg: PrepareConfig,
) -> dict[str, Any]:
    """Look at everything, every byte of it, print and write it; returns what audit.json holds.

    Raises UserError, after all was written, if a shard is not what prepare wrote: no figure but the manifest's counts
    has anything of it.
    trained_on: the sources that are mixed in training; fingerprint: of the lengths to use, None = those that the
    manifests have, if they all agree.
    """
    from vlm_nemo.data.prepare.audit_plots import draw  # late: matplotlib

    fingerprint = fingerprint or _common_lengths(manifests)
    damaged = {name: _find_damage(out / name, manifest) for name, manifest in manifests.items()}
    sound: dict[str, Manifest] = {
        name: manifest | {"shards": [shard for shard in manifest["shards"] if shard["name"] not in damaged[name]]}
        for name, manifest in manifests.items()
    }
    surveys = {name: survey(out / name, one, cfg.audit_samples, damaged[name]) for name, one in manifests.items()}
    copies = count_copies(
        {name: [out / name / shard["name"] for shard in manifest["shards"]] for name, manifest in sound.items()},
        {name: sum(shard["images"] for shard in manifest["shards"]) for name, manifest in sound.items()},
    )
    sizes: dict[str, np.ndarray] = {}
    if fingerprint:
        for name, manifest in sound.items():
            sizes[name] = sample_sizes(out / name, manifest, fingerprint, spec, LENGTH_SAMPLES)
        if len(trained_on) > 1:
            parts = {name: sizes[name] for name in trained_on}
            sizes[ALL] = mixed_lengths(parts, {name: m["records"] for name, m in trained_on.items()})
    lengths = {name: values[:, 0] for name, values in sizes.items() if len(values)}
    rehearsals = {name: found for name in lengths if (found := rehearse(sizes[name], cfg.capacity))}
    capacities = sorted({*CAPACITIES, cfg.capacity})
    advice = {name: advise(values, cfg.capacity) for name, values in lengths.items()}
    fills = {name: {c: pack_fill(values, c) for c in capacities} for name, values in lengths.items()}
    for name, one in advice.items():
        fills[name][cfg.capacity] = one.wanted.fill  # of another sample: one thing has one figure
    content = _content(manifests, damaged, surveys, copies, lengths, fills, advice, rehearsals, fingerprint, spec)
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(folder / "audit.png", manifests, surveys, lengths, fills, cfg.capacity, ALL)
    console = Console(markup=False, emoji=False)  # what the data says is shown as it stands
    console.width = max(console.width, WIDTH)  # a log file is wide enough
    _print(console, content, advice, cfg, folder)
    _refuse(out, damaged)
    return content


def _find_damage(folder: Path, manifest: Manifest) -> dict[str, str]:
    """{shard: what is wrong with it}"""
    shards = {str(shard["name"]): shard for shard in manifest["shards"]}
    console = Console(stderr=True, markup=False, emoji=False)
    with Meter(console, f"verify {manifest['source']}", manifest["records"]) as meter:
        return dict(
            verify(ShardFolder(folder), lambda name: meter.advance(shards[name]["records"], shards[name]["bytes"]))
        )


def _refuse(out: Path, damaged: Mapping[str, Mapping[str, str]]) -> None:
    """Raises UserError if there is damage."""
    names = [str(out / source / shard) for source, shards in damaged.items() for shard in shards]
    if names:
        more = f" and {len(names) - NAMED} more (audit.json has all)" if len(names) > NAMED else ""
        raise UserError(
            f"damaged: {', '.join(names[:NAMED])}{more}; remove them and run the same command again, it makes them anew"
        )


def _common_lengths(manifests: Mapping[str, Manifest]) -> str | None:
    """Lengths that every source has; the last one, as a tokenizer that was tried later is the likelier choice."""
    common = set.intersection(*(set(manifest["lengths"]) for manifest in manifests.values()))
    ordered = [fingerprint for manifest in manifests.values() for fingerprint in manifest["lengths"]]
    return next((fingerprint for fingerprint in reversed(ordered) if fingerprint in common), None)


def _content(
    manifests: Mapping[str, Manifest],
    damaged: Mapping[str, Mapping[str, str]],
    surveys: Mapping[str, Survey],
    copies: Copies,
    lengths: Mapping[str, np.ndarray],
    fills: Mapping[str, Mapping[int, float]],
    advice: Mapping[str, Advice],
    rehearsals: Mapping[str, Rehearsal],
    fingerprint: str | None,
    spec: ImageSpec,
) -> dict[str, Any]:
    sources = {}
    for name, manifest in manifests.items():
        entry = {key: manifest[key] for key in ("kind", "seen", "records", "images", "bytes", "dropped", "filtered")}
        entry |= {"damaged": dict(damaged[name]), "examples": examples(manifest)}
        entry |= {"image_copies": copies.within[name]} | to_json(surveys[name])
        if fingerprint in manifest["lengths"]:
            entry["text_tokens"] = manifest["lengths"][fingerprint]["tokens"]
            entry["unusable"] = manifest["lengths"][fingerprint]["unusable"]
        sources[name] = entry
    return {
        "sources": sources,
        "images_in_two_sources": [{"sources": list(pair), "images": n} for pair, n in sorted(copies.across.items())],
        "copies_estimated_from_one_in": copies.thinned,
        "lengths": fingerprint,
        "tokens_an_image": count_tokens(spec, [TYPICAL]),
        "tokens_said": tokens_said(spec),
        "tokens": {name: percentiles(values) | {"mean": float(values.mean())} for name, values in lengths.items()},
        "fill": {name: {str(c): round(fill, 5) for c, fill in row.items()} for name, row in fills.items()},
        "advice": {name: str(one) for name, one in advice.items()},
        "delay": {name: one.delay for name, one in rehearsals.items()},
        "vision_balance": {
            name: {str(rows): round(value, 4) for rows, value in one.balance.items()}
            for name, one in rehearsals.items()
        },
    }


def examples(manifest: Manifest) -> dict[str, list[str]]:
    """{reason or rule: a few samples that were left out for it}"""
    found: dict[str, list[str]] = {}
    for shard in manifest["shards"]:
        for name, reason, detail in shard["names"]:
            if len(listed := found.setdefault(reason, [])) < EXAMPLES:
                listed.append(f"{name}: {detail}")
        for rule, tally in shard.get("filtered", {}).items():
            listed = found.setdefault(rule, [])
            listed += tally["examples"][: EXAMPLES - len(listed)]
    if excluded := manifest.get("excluded", {}).get("examples"):
        found[DUPLICATE] = list(excluded)
    return found


def _print(
    console: Console, content: Mapping[str, Any], advice: Mapping[str, Advice], cfg: PrepareConfig, folder: Path
) -> None:
    sources = content["sources"]
    _show(console, "samples", ("source", "seen", "used", "broken", "left out", "images", "copies", "MB", "damaged"), [
        (
            name,
            *(f"{n:,}" for n in (entry["seen"], entry["records"], *_bad_and_unwanted(entry["dropped"]))),
            *(f"{n:,}" for n in (entry["images"], entry["image_copies"])),
            f"{entry['bytes'] / 1e6:,.1f}",
            f"{len(entry['damaged']):,}",
        )
        for name, entry in sources.items()
    ])  # fmt: skip
    if rows := [(name, *one) for name, entry in sources.items() for one in entry["damaged"].items()]:
        _show(console, "damaged", ("source", "shard", "what is wrong"), rows, left=3)
    for shared in content["images_in_two_sources"]:
        console.print(f"{shared['images']:,} images are in both {' and '.join(shared['sources'])}", highlight=False)
    if content["copies_estimated_from_one_in"] > 1:
        console.print(f"copies are estimated from one hash in {content['copies_estimated_from_one_in']}")
    rows = []
    for name, entry in sources.items():
        for what, key in (("shorter side, px", "shorter_side"), ("aspect", "aspect"), ("words", "words")):
            rows.append((name, what, *_points(entry[key])))
        if name in content["tokens"]:
            rows.append((name, content["tokens_said"], *_points(content["tokens"][name])))
        for fact, summary in entry["facts"].items():
            if "percentiles" in summary:
                rows.append((name, fact, *_points(summary["percentiles"])))
    _show(console, "sizes, lengths and numbers", ("source", "of", *POINTS), rows)
    rows = []
    for name, entry in sources.items():
        rows.append((name, "writing", _shares(entry["scripts"], entry["texts_read"])))
        for fact, summary in entry["facts"].items():
            for key in ("values", "hosts"):
                if key in summary:
                    rows.append((name, fact, _shares(summary[key], entry["texts_read"])))
    _show(console, f"texts, from a sample of {cfg.audit_samples}", ("source", "by", "share"), rows, left=3)
    rows = [
        (name, reason, str(entry["dropped"].get(reason, entry["filtered"].get(reason, ""))), listed[0])
        for name, entry in sources.items()
        for reason, listed in entry["examples"].items()
    ]
    if rows:
        _show(console, "left out", ("source", "reason", "samples", "for example"), rows, left=4)
    if not advice:
        console.print("no token lengths are prepared: add tokenizer=DIR template=NAME for tokens and advice on packing")
    else:
        columns = next(iter(content["fill"].values()))
        fills = [(name, *(percent(fill) for fill in row.values())) for name, row in content["fill"].items()]
        _show(console, "fill of packed rows by capacity", ("source", *columns), fills)
        title = f"rows of {cfg.capacity}: longest wait of a sample, in samples; busiest of {RANKS} towers over the mean"
        _show(console, title, ("source", "wait", *(f"{rows} rows a rank" for rows in ROWS)), [
            (name, f"{delay:,}", *(f"{value:.3f}" for value in content["vision_balance"][name].values()))
            for name, delay in content["delay"].items()
        ])  # fmt: skip
        for name, one in advice.items():
            console.print(f"{name}: {one}", highlight=False, soft_wrap=True)
    console.print(f"written: {folder / 'audit.json'}, {folder / 'audit.png'}", highlight=False, soft_wrap=True)


def _show(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 1) -> None:
    """left: columns that are text; the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table, highlight=False)
    console.print()


def _bad_and_unwanted(dropped: Mapping[str, int]) -> tuple[int, int]:
    unwanted = sum(dropped.get(reason, 0) for reason in UNWANTED)
    return sum(dropped.values()) - unwanted, unwanted


def _points(found: Mapping[str, float]) -> list[str]:
    return [f"{found[point]:.3g}" if found[point] < 1000 else f"{found[point]:,.0f}" for point in POINTS if found]


def _shares(counts: Mapping[str, int], total: int) -> str:
    return ", ".join(f"{name} {100 * n / max(1, total):.1f} %" for name, n in counts.items())
