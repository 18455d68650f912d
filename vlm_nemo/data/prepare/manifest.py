"""Read a manifest.yaml: the sources of a data set, what kind each is, where it lies, what of it is wanted."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_nemo.data.prepare.filters import Rule, read_filter
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.types import UserError

RESERVED = ("tokenizer", "audit", "ledger.json", ".lock", ".", "..")
"""What prepare itself writes beside the sources."""
_COMMON = ("kind", "held_out", "filter", "drop_duplicates", "max_bad_fraction")
"""Keys that a source of any kind may have."""


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
    filter: tuple[Rule, ...] = ()
    drop_duplicates: bool = False
    """Records whose images were all seen before, in the same order, in this source are left out."""
    max_bad_fraction: float | None = None
    """None: prepare's own."""


def read_manifest(path: Path, folder: str | None = None) -> list[RawSource]:
    """Sources of a manifest.yaml; paths are relative to `folder`, else to its `root`, else to where it lies.

    Raises UserError.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"manifest={path} cannot be read: {error}") from None
    sources = _keys(content, ("name", "root", "sources"), ("sources",), str(path))["sources"]
    if not isinstance(sources, dict) or not sources:
        raise UserError(f"{path}: sources names no source")
    root = Path(folder) if folder is not None else path.parent / str(content.get("root") or "")
    return [_source(str(name), entry, root, f"{path}: sources.{name}") for name, entry in sources.items()]


def _source(name: str, entry: Any, root: Path, where: str) -> RawSource:
    if "/" in name or name in RESERVED:
        raise UserError(f"{where} cannot be the name of a folder of shards; choose another")
    kind = str(entry.get("kind")) if isinstance(entry, dict) else "None"
    if kind not in KINDS:
        raise UserError(f"{where}.kind={kind} is unknown; {_nearest(kind, tuple(KINDS))}")
    known = KINDS[kind]
    _keys(entry, (*_COMMON, *known.keys), known.needed, where)
    flags = {}
    for key in ("held_out", "drop_duplicates"):
        flags[key] = entry.get(key, False)
        if not isinstance(flags[key], bool):
            raise UserError(f"{where}.{key}={flags[key]} must be true or false")
    limit = entry.get("max_bad_fraction")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit <= 1):
        raise UserError(f"{where}.max_bad_fraction={limit} must be a number from 0 to 1")
    return RawSource(
        name=name,
        kind=kind,
        where={key: root / str(entry[key]) for key in known.paths if key in entry},
        options={key: str(entry[key]) for key in known.options if key in entry},
        filter=read_filter(entry.get("filter"), f"{where}.filter"),
        max_bad_fraction=limit,
        **flags,
    )


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
