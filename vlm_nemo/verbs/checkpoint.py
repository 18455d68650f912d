"""`vlm-nemo checkpoint list|verify|prune DIR`: what checkpoints there are, whether they are whole, which may go.

Reads and removes files alone: no torch, so that it answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_nemo.train import manifest
from vlm_nemo.train.config import CheckpointsConfig
from vlm_nemo.train.manifest import MANIFEST, Damaged, File
from vlm_nemo.types import UserError

WIDTH = 160
"""Columns of the table where there is no terminal."""
PARTS = ("vision", "projector", "language")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A step folder, looked at."""

    path: Path
    at: str
    layout: str
    precision: str
    frozen: str
    files: tuple[File, ...]
    bad: tuple[str, ...]
    """Files that are missing, resized or (where they were read) altered; or what else is wrong."""

    @property
    def step(self) -> int:
        return manifest.step_of(self.path) or 0

    @property
    def size(self) -> int:
        return manifest.total_bytes(self.files)

    @property
    def inodes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(device, inode) -> bytes, names that it has anywhere."""
        there = [path for path in self.path.rglob("*") if path.is_file()]
        return {((s := path.stat()).st_dev, s.st_ino): (s.st_size, s.st_nlink) for path in there}


def checkpoint(cfg: CheckpointsConfig) -> None:
    """Do what cfg.action says. Raises UserError where there is no checkpoint, where one is damaged (verify), or where
    none is intact (prune)."""
    found = _found(Path(cfg.dir))
    console = Console()
    if not console.is_terminal:  # a log file is wide enough
        console.width = WIDTH
    if cfg.action == "prune":
        _prune(cfg, found, console)
        return
    read = cfg.action == "verify"
    known: dict[tuple[int, int], str] = {}
    seen = [look(path, read=read, known=known) for path in found]
    good = "intact" if read else "sizes fit"
    _show(console, found[0].parent, seen, [good if not one.bad else _wrong(one) for one in seen])
    inodes = {which: size for one in seen for which, (size, _) in one.inodes.items()}
    console.print(f"{len(seen)} checkpoints take {_bytes(sum(inodes.values()))} on the disk", highlight=False)
    for left in manifest.leftovers(found[0].parent):
        console.print(f"{left.name}: left by a save or removal under way, or one that was interrupted", highlight=False)
    damaged = [one for one in seen if one.bad]
    if read and damaged:
        which = "; ".join(f"{one.path.name}: {_wrong(one)}" for one in damaged)
        raise UserError(f"{len(damaged)} of {len(seen)} checkpoints are damaged: {which}")


def _found(path: Path) -> list[Path]:
    """Step folders, newest first."""
    if (path / MANIFEST).is_file():
        return [path.resolve()]
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and (found := manifest.newest(folder)):
            return found
    raise UserError(f"no checkpoint at {path}: give a run's folder, its folder of checkpoints, or a step folder")


def look(path: Path, *, read: bool, known: dict[tuple[int, int], str] | None = None) -> Seen:
    """What a step folder says of itself, and which of its files are not as it says. read: compare their hashes."""
    about: dict[str, Any] = {}
    files: tuple[File, ...] = ()
    try:
        content = manifest.read_manifest(path)
        files, about = tuple(content.files.values()), content.written
        bad = tuple(manifest.damaged(path, files, read=read, known=known))
    except Damaged:
        bad = (MANIFEST,)
    except UserError as error:  # another format
        bad = (str(error),)
    config = _config(path)
    stamp = about.get("at") or datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC).isoformat()
    rates = config.get("optim", {})
    frozen = about.get("frozen") or [part for part in PARTS if rates and rates.get(f"{part}_lr") is None]
    return Seen(
        path=path,
        at=stamp[:16].replace("T", " "),
        layout=_layout(about.get("layout") or config.get("parallel", {})),
        precision=str(config.get("precision", "")),
        frozen=" ".join(frozen),
        files=files,
        bad=bad,
    )


def _config(path: Path) -> dict[str, Any]:
    """Of the run, as plain data; nothing where it cannot be read: that is told as damage."""
    import yaml

    try:
        content = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _layout(sizes: dict[str, Any]) -> str:
    """The sizes that are not 1: `8 ranks: tensor 2, pipeline 2, data 2`."""
    names = ("tensor", "pipeline", "virtual", "context", "expert", "data")
    said = ", ".join(f"{name} {sizes[name]}" for name in names if isinstance(sizes.get(name), int) and sizes[name] > 1)
    world = sizes.get("world")
    if world is None:
        return said
    return f"{world} rank{'s' if world > 1 else ''}" + (f": {said}" if said else "")


def _show(console: Console, folder: Path, seen: Sequence[Seen], states: Sequence[str]) -> None:
    table = Table(title=str(folder), title_justify="left")
    for name in ("step", "written (UTC)", "size", "shared", "layout", "precision", "frozen", "files"):
        table.add_column(name, justify="right" if name in ("step", "size", "shared") else "left")
    for one, state in zip(seen, states, strict=True):
        shared = sum(size for size, names in one.inodes.values() if names > 1)
        cells = (one.at, _bytes(one.size), _bytes(shared), one.layout, one.precision, one.frozen, state)
        table.add_row(str(one.step), *map(Text, cells), style="red" if one.bad else None)
    console.print(table)


def _wrong(one: Seen) -> str:
    more = f" and {len(one.bad) - 3} more" if len(one.bad) > 3 else ""
    return f"damaged: {', '.join(one.bad[:3])}{more}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _prune(cfg: CheckpointsConfig, found: Sequence[Path], console: Console) -> None:
    if cfg.keep < 1:
        raise UserError(f"keep={cfg.keep}: at least the newest stays; to remove a whole run, remove its folder")
    if cfg.every < 0:
        raise UserError(f"every={cfg.every} must be 0 or a number of steps")
    if (Path(cfg.dir) / MANIFEST).is_file():
        raise UserError(f"{cfg.dir} is one checkpoint; prune takes a run's folder or its folder of checkpoints")
    seen = [look(path, read=False) for path in found]
    # Sizes are not enough for the one on which everything rests
    intact = next((i for i, one in enumerate(seen) if not one.bad and not look(one.path, read=True).bad), None)
    if intact is None:
        raise UserError(f"no checkpoint of {found[0].parent} is intact, so nothing is removed")
    states = reasons(seen, intact, keep=cfg.keep, every=cfg.every)
    going = [one for one, state in zip(seen, states, strict=True) if state == "remove"]
    _show(console, found[0].parent, seen, states)
    freed = _bytes(_freed(going))
    if not going:
        console.print("nothing to remove", highlight=False)
    elif not cfg.yes:
        console.print(f"{len(going)} would go and free {freed}; the same with yes=true removes them", highlight=False)
    else:
        for one in reversed(going):  # the oldest first: what an interruption leaves are the newer ones
            manifest.remove(one.path)
        console.print(f"removed {len(going)}, which freed {freed}", highlight=False)


def reasons(seen: Sequence[Seen], intact: int, *, keep: int, every: int) -> list[str]:
    """ "remove", or why a checkpoint stays, of each; newest first. intact: which of them is the newest intact one.

    Damaged ones do not count as kept, and go only where whole ones of their age do.
    """
    whole = [i for i, one in enumerate(seen) if not one.bad or i == intact]
    newest = [i for i in whole if i >= intact][:keep]
    states = []
    for i, one in enumerate(seen):
        if i == intact:
            states.append("stays: the newest intact one")
        elif i in newest:
            states.append(f"stays: of the {keep} newest")
        elif i < newest[-1]:
            states.append(f"stays: {_wrong(one)}" if one.bad else "stays: newer than the newest intact one")
        elif every and one.step % every == 0:
            states.append(f"stays: a multiple of {every}")
        else:
            states.append("remove")
    return states


def _freed(going: Sequence[Seen]) -> int:
    """Bytes that have no other name than those that go."""
    names: Counter[tuple[int, int]] = Counter()
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for one in going:
        names.update(one.inodes.keys())
        sizes |= one.inodes
    return sum(size for which, (size, links) in sizes.items() if names[which] == links)
