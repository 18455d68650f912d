"""The raw formats that `prepare` reads.

A source is cut into units, one a shard to be written. A unit is plain data, so that any process can convert it; its
`fingerprint` changes when what it was made from changes. To add a format: a file with a unit class and a function that
lists units, and an entry in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.img2dataset import list_tars
from vlm_nemo.data.raw.llava import list_llava
from vlm_nemo.data.raw.unit import Map

KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Path], int, Map], list[Any]]]] = {
    "img2dataset": (("path",), list_tars),
    "llava": (("json", "images"), list_llava),
}
"""kind in manifest.yaml -> (its paths, what lists its units)."""
