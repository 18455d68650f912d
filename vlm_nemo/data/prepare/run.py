"""`vlm-nemo prepare`: raw data sets to shards with an index and a manifest; a tokenizer, lengths, an audit if wanted.

What was prepared from the same files is kept, shard by shard, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.layout.images import tokens_said
from vlm_nemo.data.layout.spec import ImageSpec, image_spec
from vlm_nemo.data.ledger import Ledger, check_budget
from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.prepare.manifest import RawSource, read_manifest
from vlm_nemo.data.prepare.measure import check_template, fingerprint_of, measure_source, mixed_lengths, sample_lengths
from vlm_nemo.data.prepare.pool import Pool
from vlm_nemo.data.prepare.source import check_all_budgets, prepare_source
from vlm_nemo.data.prepare.source_manifest import Manifest, account
from vlm_nemo.data.storage.folders import open_folder
from vlm_nemo.runtime.lock import FULL, folder_lock
from vlm_nemo.types import IMAGE_MARKER, UserError

TOKENIZER = "tokenizer"
LEDGER = "ledger.json"
AUDIT = "audit"
ADVICE_SAMPLES = 8192
"""Lengths a source by which a capacity is judged."""


def prepare(cfg: PrepareConfig) -> dict[str, Manifest]:
    """Convert every source of cfg.manifest to shards under cfg.out; returns {source: its manifest}.

    Samples that cannot be used are logged by name and counted, in each source's manifest and in out/ledger.json.
    Raises UserError if the manifest is wrong, another process prepares the same folder, a raw file is damaged, no
    sample of a source is left, more than cfg.max_bad_fraction of a source had to be dropped (what was converted is
    kept: a higher limit goes on from there), or the disk is full.
    """
    _check(cfg)
    sources = read_manifest(Path(cfg.manifest), cfg.root)
    spec = image_spec(
        cfg.layout,
        size=cfg.image_size,
        patch=cfg.patch_size,
        reduce=cfg.reduce,
        factor=cfg.factor,
        queries=cfg.queries,
    )
    out = Path(cfg.out)
    console = Console(stderr=True, markup=False, emoji=False)
    with ExitStack() as stack:
        stack.enter_context(_full_disk_is_said(out))
        stack.enter_context(folder_lock(out, "out"))
        pool = Pool(cfg.workers, stack)
        manifests = _convert_all(sources, out, cfg, pool, console)
        tokenizer = cfg.tokenizer
        if cfg.tokenizer_vocab:
            learned = {source.name: manifests[source.name] for source in sources if not source.held_out}
            _prepare_tokenizer(out, learned, cfg.tokenizer_vocab, console)
            tokenizer = str(out / TOKENIZER)
        fingerprint = None
        if tokenizer:
            fingerprint = fingerprint_of(tokenizer, cfg.template, cfg.layout)
            for name, manifest in manifests.items():
                measure_source(out / name, manifest, tokenizer, cfg.template, cfg.layout, pool, console)
        trained_on = {source.name: manifests[source.name] for source in sources if not source.held_out} or manifests
        if fingerprint and not cfg.audit:
            _advise(out, trained_on, fingerprint, spec, cfg.capacity, console)
        if cfg.audit:
            from vlm_nemo.data.prepare.audit import audit  # late: it draws

            audit(out, manifests, trained_on, fingerprint, spec, cfg)
    return manifests


def _check(cfg: PrepareConfig) -> None:
    for key in ("shard_samples", "workers", "capacity", "audit_samples", "image_size", "patch_size"):
        if (value := getattr(cfg, key)) < 1:
            raise UserError(f"{key}={value} must be at least 1")
    check_budget("", cfg.max_bad_fraction, cfg.min_samples_before_stop)
    if cfg.tokenizer and cfg.tokenizer_vocab:
        raise UserError(
            f"tokenizer={cfg.tokenizer} and tokenizer_vocab={cfg.tokenizer_vocab} name two tokenizers; give one of "
            "them (a second run with the other adds its lengths)"
        )
    check_template(cfg.template)
    if cfg.tokenizer:
        fingerprint_of(cfg.tokenizer, cfg.template, cfg.layout)


@contextmanager
def _full_disk_is_said(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors' own error has the number in its text only
        full = error.errno in FULL if isinstance(error, OSError) else any(f"os error {n})" in str(error) for n in FULL)
        if not full:
            raise
        raise UserError(
            f"no space left for out={out} ({shutil.disk_usage(out).free / 1e6:.0f} MB free, or a quota is used up); "
            "make room and run the same command again: it goes on from there"
        ) from None


def _convert_all(
    sources: list[RawSource], out: Path, cfg: PrepareConfig, pool: Pool, console: Console
) -> dict[str, Manifest]:
    """Source after source; ledger.json is written whatever happens, and tells what was seen until then."""
    manifests: dict[str, Manifest] = {}
    try:
        for source in sources:
            for manifest in prepare_source(source, out / source.name, cfg, pool, console):
                manifests[source.name] = manifest
    finally:
        _write_ledger(out, manifests)
    check_all_budgets(sources, manifests, cfg)
    return manifests


def _write_ledger(out: Path, manifests: Mapping[str, Manifest]) -> None:
    ledger = Ledger()
    ledger.sources = {name: account(manifest) for name, manifest in manifests.items()}
    ledger.seen = sum(manifest["seen"] for manifest in manifests.values())
    (out / LEDGER).write_text(json.dumps(ledger.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _prepare_tokenizer(out: Path, manifests: Mapping[str, Manifest], vocab: int, console: Console) -> None:
    """Train on what the shards say, unless it was done on the same shards."""
    shards = {name: [shard["sha256"] for shard in manifest["shards"]] for name, manifest in manifests.items()}
    origin: dict[str, Any] = {"vocab": vocab, "shards": shards}
    excluded = {name: m["excluded"]["sha256"] for name, m in manifests.items() if "excluded" in m}
    if excluded:
        origin["excluded"] = excluded
    folder = out / TOKENIZER
    note = folder / "origin.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == origin:
        console.print(f"tokenizer: reused as it was ({folder})", highlight=False)
        return

    def texts() -> Iterator[str]:
        for name in manifests:
            records = open_folder(str(out / name))
            for number in range(len(records)):
                for message in records.record(number).messages:
                    yield message["content"].replace(IMAGE_MARKER, "")

    note.unlink(missing_ok=True)
    tokens = train_tokenizer(texts(), vocab, folder)
    note.write_text(json.dumps(origin) + "\n", encoding="utf-8")
    console.print(f"tokenizer: {tokens} tokens ({folder})", highlight=False)


def _advise(
    out: Path, manifests: Mapping[str, Manifest], fingerprint: str, spec: ImageSpec, capacity: int, console: Console
) -> None:
    """Say how full rows will be, by source and over all, and what would fill them."""
    from vlm_nemo.data.prepare.advice import advise  # late: it imports torch

    lengths = {
        name: sample_lengths(out / name, manifest, fingerprint, spec, ADVICE_SAMPLES)
        for name, manifest in manifests.items()
    }
    if len(lengths) > 1:
        records = {name: manifest["records"] for name, manifest in manifests.items()}
        lengths["all sources"] = mixed_lengths(lengths, records)
    for name, values in lengths.items():
        if len(values):
            console.print(
                f"{name}: with {tokens_said(spec)}, {advise(values, capacity)}",
                highlight=False,
                soft_wrap=True,
            )
