"""A checkpoint as files: folders that appear whole or not at all, with the SHA-256 of every file. No torch here.

    checkpoints/
      latest                        the newest finished folder's name
      step_000050/
        manifest.json               SHA-256 and size of every other file; written last
        state.json                  step, loader position, ledger, versions: plain data
        config.yaml                 the run's resolved configuration, plain data
        tokenizer/                  what the model was trained with
        weights/language_00000.safetensors, optimizer/rank_00000.safetensors, ...

A folder is written under a hidden name, then renamed; `latest` moves last. So a kill at any moment leaves either the
old state or the new one. What the tensor files hold is described in tensors.py; files that several checkpoints share
(a frozen part's) are hard links to the same bytes, so every folder is complete for whoever copies, moves or removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_nemo.types import UserError

FORMAT = 2
"""Of what a checkpoint holds. 1: the vision tower's patch matrix took the colours of a patch one after the other."""
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{6,})$")


class Damaged(ValueError):
    """A manifest that does not say what a checkpoint holds."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a checkpoint."""

    file: str
    """Its path inside the step folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished checkpoint says of itself."""

    files: dict[str, File]
    written: dict[str, Any]
    """When, at which layout, which parts were frozen. Empty in older checkpoints and in imported ones."""


def step_folder(step: int) -> str:
    return f"step_{step:06d}"


def draft_folder(step: int) -> str:
    """Where a checkpoint is before it is finished."""
    return f".{step_folder(step)}.draft"


def step_of(path: Path) -> int | None:
    """The step of a folder's name; None for another name."""
    match = _STEP.match(path.name)
    return int(match[1]) if match else None


def newest(folder: Path) -> list[Path]:
    """Finished checkpoints of a checkpoints folder, newest first."""
    found = [p for p in folder.glob("step_*") if step_of(p) is not None and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: step_of(p) or 0, reverse=True)


def find(path: str | Path) -> Path:
    """The step folder that a user means: itself, or the newest one of a checkpoints folder or of a run folder.

    Raises UserError if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for folder in (path.parent, path) if path.name == "latest" else (path, path / "checkpoints"):
        pointer = folder / "latest"
        if pointer.is_file() and (folder / pointer.read_text().strip() / MANIFEST).is_file():
            return folder / pointer.read_text().strip()
        if found := newest(folder):
            return found[0]
    raise UserError(f"no checkpoint at {path}: give a step folder (…/checkpoints/step_000100) or a run's folder")


def read_manifest(path: Path) -> Manifest:
    """Of a step folder. Raises Damaged, and UserError for a checkpoint of another format."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        entries = [File(**{name: entry[name] for name in ("file", "bytes", "sha256")}) for entry in content["files"]]
        files, written = {entry.file: entry for entry in entries}, content.get("format")
        about = dict(content.get("written", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(str(error)) from None
    if "state.json" not in files or not any(name.startswith("weights/") for name in files):
        raise Damaged("no state or no weights")
    if written != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {written}, this version reads {FORMAT}: with the version that wrote it, "
            "vlm-nemo convert checkpoint=DIR out=HF; with this one, vlm-nemo convert hf=HF out=DIR"
        )
    return Manifest(files=files, written=about)


def damaged(
    path: Path, files: Iterable[File], *, read: bool = True, known: dict[tuple[int, int], str] | None = None
) -> list[str]:
    """Names of those that are missing, resized or, if they are to be read, altered.

    known: (device, inode) -> hash of what was read already, filled on the way: files that checkpoints share are read
    once.
    """
    bad = []
    seen = {} if known is None else known
    for entry in files:
        file = path / entry.file
        if not file.is_file() or (about := file.stat()).st_size != entry.bytes:
            bad.append(entry.file)
        elif read:
            which = (about.st_dev, about.st_ino)
            if which not in seen:
                seen[which] = sha256(file)
            if seen[which] != entry.sha256:
                bad.append(entry.file)
    return bad


def write_manifest(draft: Path, known: Collection[File] = (), written: dict[str, Any] | None = None) -> None:
    """List every file of a folder that is complete but for this list.

    known: what need not be read for it. written: what is said about the checkpoint, plain data.
    """
    files = {entry.file: entry for entry in known}
    for path in sorted(draft.rglob("*")):
        name = str(path.relative_to(draft))
        if path.is_file() and name not in files:
            sync(path)
            files[name] = File(file=name, bytes=path.stat().st_size, sha256=sha256(path))
    content: dict[str, Any] = {"format": FORMAT, **({"written": written} if written else {})}
    write_json(draft / MANIFEST, {**content, "files": [asdict(files[name]) for name in sorted(files)]})
    for folder in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
        sync(folder)


def publish(draft: Path, final: Path) -> None:
    """Make the finished draft the newest checkpoint."""
    draft.rename(final)
    sync(final.parent)
    pointer = final.parent / ".latest.draft"
    pointer.write_text(final.name + "\n")
    sync(pointer)
    pointer.replace(final.parent / "latest")
    sync(final.parent)


def share(source: Path, target: Path, entry: File) -> None:
    """The same bytes under a second name; a copy of them where the file system has no hard links.

    Raises OSError, also where a copy turns out to be other bytes than `entry` says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
        if damaged(target.parent, [File(file=target.name, bytes=entry.bytes, sha256=entry.sha256)]):
            raise OSError(f"{source} is damaged") from None


def can_link(folder: Path) -> bool:
    """Whether one file can have two names there."""
    probe, second = folder / ".link", folder / ".link.2"
    try:
        probe.touch()
        second.unlink(missing_ok=True)
        os.link(probe, second)
        return True
    except OSError:
        return False
    finally:
        for path in (probe, second):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A checkpoint, at once out of sight, so that an interrupted removal leaves no half checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def drop_all_but(folder: Path, keep: int) -> None:
    """Leave the `keep` newest checkpoints of a folder; 0 = all."""
    for old in newest(folder)[keep:] if keep > 0 else []:
        remove(old)


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves and removals left, and damaged checkpoints that were set aside."""
    names = (r"\.step_\d{6,}\.(draft|old|damaged)", r"\.frozen")
    return sorted(p for p in folder.glob(".*") if p.is_dir() and any(re.fullmatch(n, p.name) for n in names))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def total_bytes(files: Sequence[File]) -> int:
    return sum(entry.bytes for entry in files)
