"""Look at one prepared source: image sizes from the indexes, texts and facts from a sample of its records.

Indexes are streamed shard by shard into counts of fixed size; no image is read, and no list grows with the data.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from safetensors import safe_open

from vlm_nemo.data.prepare.filters import count_words
from vlm_nemo.data.prepare.source_manifest import Manifest
from vlm_nemo.data.sample import SampleError
from vlm_nemo.data.storage.shards import ShardFolder, index_path
from vlm_nemo.types import IMAGE_MARKER

POINTS = {"min": 0, "1 %": 1, "10 %": 10, "median": 50, "90 %": 90, "99 %": 99, "max": 100}
"""Percentiles that are told."""
MAX_SIDE = 1 << 16
"""Longer sides are refused by prepare long before."""
GRID = np.geomspace(8, 8192, 61)
"""Edges of the histogram over width and height, pixels: twelve bins a doubling of both."""
COMMONEST = 10
"""Values of a fact that are told one by one."""
_DISTINCT = 1000
"""A fact with more different values in the sample is a name, not a group."""


@dataclass(kw_only=True)
class Survey:
    """What is in one source."""

    shorter: dict[str, float]
    """Percentiles of the images' shorter side, pixels."""
    longer: dict[str, float]
    aspect: dict[str, float]
    """Longer over shorter side."""
    grid: np.ndarray
    """[60, 60] images by width and height, between the edges of GRID (ends included in the outermost)."""
    words: np.ndarray
    """Words of each text of the sample."""
    scripts: dict[str, int]
    """Writing that most letters of a text belong to: {"Latin": n, "Cyrillic": n, "none": n}."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: {"stated": share, "percentiles": …} or {"stated", "values": {text: n}} or {"stated", "hosts": …}}"""
    read: int = 0
    """Records of the sample."""


def survey(folder: Path, manifest: Manifest, samples: int, damaged: Container[str] = ()) -> Survey:
    """samples: how many texts are read; damaged: shards that are not looked at."""
    shards = [shard for shard in manifest["shards"] if shard["images"] and shard["name"] not in damaged]
    tars = [folder / shard["name"] for shard in shards]
    shorter, longer = np.zeros(MAX_SIDE, dtype=np.int64), np.zeros(MAX_SIDE, dtype=np.int64)
    aspects = np.zeros(MAX_SIDE, dtype=np.int64)
    grid = np.zeros((len(GRID) - 1,) * 2, dtype=np.int64)
    for tar in tars:
        with safe_open(index_path(tar), framework="np") as index:
            width, height = index.get_tensor("image_width"), index.get_tensor("image_height")
        short, long = np.minimum(width, height), np.maximum(width, height)
        for counts, values in ((shorter, short), (longer, long), (aspects, 100 * long // np.maximum(short, 1))):
            counts += np.bincount(np.minimum(values, MAX_SIDE - 1), minlength=MAX_SIDE)
        across, up = (np.clip(np.searchsorted(GRID, side, "right") - 1, 0, len(grid) - 1) for side in (width, height))
        np.add.at(grid, (across, up), 1)
    words, scripts, facts, read = _read_sample(folder, samples, damaged)
    return Survey(
        shorter=percentiles_of_counts(shorter),
        longer=percentiles_of_counts(longer),
        aspect={name: value / 100 for name, value in percentiles_of_counts(aspects).items()},
        grid=grid,
        words=np.array(words, dtype=np.int64),
        scripts=dict(scripts.most_common()),
        facts={name: _summarise(values, read) for name, values in sorted(facts.items())},
        read=read,
    )


def _read_sample(
    folder: Path, samples: int, damaged: Container[str]
) -> tuple[list[int], Counter[str], dict[str, list[float | str]], int]:
    records = ShardFolder(folder)
    words, scripts = [], Counter[str]()
    facts: dict[str, list[float | str]] = {}
    numbers = np.linspace(0, len(records) - 1, min(samples, len(records))).astype(np.int64)
    for number in numbers.tolist():
        if records.shard(number) in damaged:
            continue
        try:
            record = records.record(number)
        except SampleError:
            continue
        words.append(count_words(record.messages))
        scripts[script_of(message["content"] for message in record.messages)] += 1
        for name, value in record.facts.items():
            facts.setdefault(name, []).append(value)
    return words, scripts, facts, len(words)


def script_of(texts: Iterable[str]) -> str:
    """ "Latin", "Cyrillic", "Cjk", …: the writing of most letters; "none" without letters."""
    counts = Counter(_script(letter) for text in texts for letter in text.replace(IMAGE_MARKER, ""))
    counts.pop("", None)
    return counts.most_common(1)[0][0] if counts else "none"


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ", 1)[0].capitalize() if letter.isalpha() else ""


def _summarise(values: list[float | str], read: int) -> dict[str, Any]:
    """A fact in short: numbers by percentiles, addresses by host, other texts by their commonest values."""
    summary: dict[str, Any] = {"stated": len(values) / max(1, read)}
    numbers = [value for value in values if isinstance(value, (int, float))]
    texts = [value for value in values if isinstance(value, str)]
    if len(numbers) >= len(texts):
        return summary | {"percentiles": percentiles(np.array(numbers, dtype=np.float64))}
    hosts = [host for text in texts if (host := _host(text))]
    name = "values"
    if len(hosts) > len(texts) // 2:
        texts, name = hosts, "hosts"
    counts = Counter(texts)
    summary["different"] = len(counts)
    if name == "hosts" or len(counts) <= min(_DISTINCT, max(COMMONEST, len(texts) // 2)):
        summary[name] = dict(counts.most_common(COMMONEST))
    return summary


def _host(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        return ""
    try:
        return urlsplit(text).hostname or ""
    except ValueError:
        return ""


def percentiles(values: np.ndarray) -> dict[str, float]:
    """{"min": …, "median": …, "max": …}; empty without values."""
    if not len(values):
        return {}
    found = np.percentile(values, list(POINTS.values()), method="nearest").tolist()
    return dict(zip(POINTS, found, strict=True))


def percentiles_of_counts(counts: np.ndarray) -> dict[str, float]:
    """The same of a histogram: counts[v] values are v."""
    total = int(counts.sum())
    if not total:
        return {}
    ranks = np.array([round(point / 100 * (total - 1)) for point in POINTS.values()])
    found = np.searchsorted(np.cumsum(counts), ranks, side="right").tolist()
    return dict(zip(POINTS, map(float, found), strict=True))


def to_json(found: Survey) -> dict[str, Any]:
    """What audit.json holds of it."""
    return {
        "shorter_side": found.shorter,
        "longer_side": found.longer,
        "aspect": found.aspect,
        "texts_read": found.read,
        "words": percentiles(found.words),
        "scripts": found.scripts,
        "facts": found.facts,
    }


def top_fact(found: Mapping[str, Survey]) -> str | None:
    """The fact by which the texts are grouped in the plot: the language, else any that most samples state."""
    shares: Counter[str] = Counter()
    for one in found.values():
        for name, summary in one.facts.items():
            if "values" in summary and 1 < summary["different"] <= 10 * COMMONEST:
                shares[name] += summary["stated"] + 10 * (name.lower() == "language")
    return shares.most_common(1)[0][0] if shares else None
