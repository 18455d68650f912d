"""Find records and images that come twice, by the hashes in the shards' indexes; no image is read.

Memory is bounded: hashes are evenly spread, so the work is cut by their first bits into parts that fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vlm_nemo.data.storage.shards import EXCLUDED, HASH_BYTES, index_path

PART = 1 << 24
"""Hashes looked at together: about 700 MB at work."""


class Duplicates(NamedTuple):
    """Records whose images were all seen before, in the same order."""

    records: np.ndarray
    """int64, sorted: numbers over all shards."""
    firsts: np.ndarray
    """int64, as many: the first record with the same images."""
    images: int
    """Images that they hold."""


def find_duplicates(tars: Sequence[Path], total: int) -> Duplicates:
    """total: records in all tars. Records without images are none: nothing tells two texts from one asked twice."""
    parts = max(1, -(-total // PART))
    found = [_duplicates_of_part(tars, part, parts) for part in range(parts)]
    records = np.concatenate([part.records for part in found])
    firsts = np.concatenate([part.firsts for part in found])
    order = np.argsort(records)
    return Duplicates(records[order], firsts[order], sum(part.images for part in found))


def _duplicates_of_part(tars: Sequence[Path], part: int, parts: int) -> Duplicates:
    collected = []
    offset = 0
    for tar in tars:
        start, hashes = _read_hashes(tar)
        keys, counts = _record_keys(start, hashes), np.diff(start)
        mine = (counts > 0) & (keys[:, 0] % parts == part)
        numbers = offset + np.flatnonzero(mine)
        collected.append((keys[mine], numbers, counts[mine]))
        offset += len(counts)
    keys = np.concatenate([k for k, _, _ in collected])
    numbers = np.concatenate([n for _, n, _ in collected])
    counts = np.concatenate([c for _, _, c in collected])
    order = np.lexsort((numbers, keys[:, 1], keys[:, 0]))
    keys, numbers, counts = keys[order], numbers[order], counts[order]
    again = np.zeros(len(keys), dtype=bool)
    again[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    # The last place where a run of equal keys began
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(keys)))) if len(keys) else np.zeros(0, dtype=int)
    return Duplicates(numbers[again], numbers[first][again], int(counts[again].sum()))


def _read_hashes(tar: Path) -> tuple[np.ndarray, np.ndarray]:
    """image_start [records + 1] and the hashes [images, 2] uint64 of a shard."""
    with safe_open(index_path(tar), framework="np") as index:
        start, hashes = index.get_tensor("image_start"), index.get_tensor("image_hash")
    return start, np.ascontiguousarray(hashes).view("<u8").reshape(-1, HASH_BYTES // 8)


def _record_keys(start: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """[records, 2] uint64: the hash of its image, or the hash of the hashes of its images; zeros without any."""
    counts = np.diff(start)
    keys = np.zeros((len(counts), 2), dtype="<u8")
    keys[counts == 1] = hashes[start[:-1][counts == 1]]
    for record in np.flatnonzero(counts > 1).tolist():
        joined = hashes[start[record] : start[record + 1]].tobytes()
        keys[record] = np.frombuffer(hashlib.blake2b(joined, digest_size=HASH_BYTES).digest(), dtype="<u8")
    return keys


def write_excluded(folder: Path, records: np.ndarray) -> str:
    """Write the numbers to pass over, atomically; returns the file's SHA-256."""
    part = folder / (EXCLUDED + ".part")
    save_file({"records": records.astype(np.int64)}, part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    os.replace(part, folder / EXCLUDED)
    return digest


class Copies(NamedTuple):
    """Equal images within and across sources."""

    images: dict[str, int]
    """Images of each source."""
    within: dict[str, int]
    """Of these, images that came earlier in the same source."""
    across: dict[tuple[str, str], int]
    """Different images that two sources share."""
    thinned: int
    """1 = counted; n = estimated from every n-th hash."""


def count_copies(sources: Mapping[str, Sequence[Path]], images: Mapping[str, int]) -> Copies:
    """Copies among the tars of several sources; above PART images a sample of the hashes speaks for all."""
    thinned = 1
    while sum(images.values()) > PART * thinned:
        thinned *= 2
    names = list(sources)
    distinct, within = {}, {}
    for name in names:
        kept = [np.zeros(0, dtype="<u8")]
        for tar in sources[name]:
            # 64 of 128 bits: among 16 million images two differ in vain once in 100,000 such counts
            hashes = _read_hashes(tar)[1][:, 0]
            kept.append(hashes if thinned == 1 else hashes[hashes % thinned == 0])
        rows = np.concatenate(kept)
        distinct[name] = np.unique(rows)
        within[name] = (len(rows) - len(distinct[name])) * thinned
    across = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = np.intersect1d(distinct[a], distinct[b], assume_unique=True)
            if len(shared):
                across[a, b] = len(shared) * thinned
    return Copies(dict(images), within, across, thinned)


def exclusion_input(manifest_shards: Sequence[Mapping[str, Any]]) -> str:
    """What the search for duplicates depends on; equal as long as the shards are."""
    return hashlib.sha256("\n".join(str(shard["index_sha256"]) for shard in manifest_shards).encode()).hexdigest()
