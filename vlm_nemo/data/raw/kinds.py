"""The raw formats that `prepare` reads.

A source is cut into units, one a shard to be written. A unit is plain data, so that any process can convert it; its
`fingerprint` changes when what it was made from changes. To add a format: a file with a unit class and a function that
lists units, and an entry in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlm_nemo.data.raw.energon_unit import list_energon
from vlm_nemo.data.raw.img2dataset import list_downloads
from vlm_nemo.data.raw.interleaved import list_documents
from vlm_nemo.data.raw.llava import list_llava
from vlm_nemo.data.raw.unit import Map
from vlm_nemo.data.raw.vqa import OPTIONS, list_vqa


class Kind(NamedTuple):
    """What a source of this kind says in manifest.yaml, besides what every source may say."""

    list_units: Callable[[dict[str, Path], dict[str, str], int, Map], list[Any]]
    """(paths by key, options by key, samples a shard, map) -> units, in order."""
    paths: tuple[str, ...]
    """Keys that name a file or a folder, relative to the manifest's root."""
    needed: tuple[str, ...]
    """Those that must be there."""
    options: tuple[str, ...] = ()
    """Keys that are not paths: column names, words, yes or no."""

    @property
    def keys(self) -> tuple[str, ...]:
        return self.paths + self.options


KINDS: dict[str, Kind] = {
    "img2dataset": Kind(list_downloads, ("path",), ("path",)),
    "llava": Kind(list_llava, ("json", "images"), ("json", "images"), ("captions",)),
    "interleaved": Kind(list_documents, ("path", "images", "downloaded"), ("path",), ("lost",)),
    "vqa": Kind(list_vqa, ("path", "images"), ("path",), tuple(OPTIONS)),
    "energon": Kind(list_energon, ("path",), ("path",), ("split",)),
}
"""kind in manifest.yaml -> how it is read."""
