"""Checkpoints: folders that appear whole or not at all, hash every file, and load at any layout. No pickle.

    checkpoints/
      latest                        the newest finished folder's name
      step_000050/
        manifest.json               SHA-256 and size of every other file; written last
        state.json                  step, loader position, ledger, versions: plain data
        config.yaml                 the run's resolved configuration, plain data
        tokenizer/                  what the model was trained with
        weights/rank_00000.safetensors, optimizer/rank_00000.safetensors, ...

A folder is written under a hidden name, then renamed; `latest` moves last. So a kill at any moment leaves either the
old state or the new one. What the tensor files hold is described in tensors.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import tensors
from vlm_nemo.train.optim import optimizer_slices, refresh_masters
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)
FORMAT = 2
"""Of what a checkpoint holds. 1: the vision tower's patch matrix took the colours of a patch one after the other."""
_STEP = re.compile(r"step_(\d{6,})$")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint found on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def updates(self) -> int:
        """Optimizer updates: steps less the skipped ones."""
        return int(self.state["updates"])


def step_folder(step: int) -> str:
    return f"step_{step:06d}"


def save(
    folder: Path,
    step: int,
    *,
    ranks: Ranks,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    write_extras: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write checkpoints/step_NNNNNN, collectively. `write_extras(folder)` adds config and tokenizer, on one rank.

    keep: how many of the newest to leave (0 = all).
    """
    final, draft = folder / step_folder(step), folder / f".{step_folder(step)}.draft"
    if ranks.main:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "weights").mkdir(parents=True)
        (draft / "optimizer").mkdir()
    dist.barrier()
    parameters = local_parameters(chunks)
    name = f"rank_{ranks.rank:05d}.safetensors"
    written = [tensors.write(draft / "weights" / name, tensors.weight_chunks(parameters))]
    if optimizer is not None:
        chunks_held = tensors.optimizer_chunks(parameters, optimizer_slices(optimizer))
        written.append(tensors.write(draft / "optimizer" / name, chunks_held))
    hashes = [_fingerprint(draft, path) for path in written if path is not None]
    for path in written:
        _sync(path)
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, hashes)
    if ranks.main:
        write_extras(draft)
        _write_json(draft / "state.json", {**state, "step": step})
        write_manifest(draft, [entry for entries in gathered for entry in entries])
        _publish(draft, final)
        _prune(folder, keep)
    dist.barrier()
    return final


def write_manifest(draft: Path, hashed: Sequence[dict[str, Any]] = ()) -> None:
    """List every file of a folder that is complete but for this list; hashed: the entries that are known already."""
    known = {entry["file"]: entry for entry in hashed}
    for path in sorted(draft.rglob("*")):
        if path.is_file() and str(path.relative_to(draft)) not in known:
            _sync(path)
            known[str(path.relative_to(draft))] = _fingerprint(draft, path)
    _write_json(draft / "manifest.json", {"format": FORMAT, "files": [known[k] for k in sorted(known)]})


def _publish(draft: Path, final: Path) -> None:
    """Make the finished draft the newest checkpoint."""
    draft.rename(final)
    _sync(final.parent)
    pointer = final.parent / ".latest.draft"
    pointer.write_text(final.name + "\n")
    _sync(pointer)
    pointer.replace(final.parent / "latest")
    _sync(final.parent)


def find(path: str | Path) -> Path:
    """The step folder that a user means: itself, or the newest one of a checkpoints folder or of a run folder.

    Raises UserError if there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    for folder in (path.parent, path) if path.name == "latest" else (path, path / "checkpoints"):
        pointer = folder / "latest"
        if pointer.is_file() and (folder / pointer.read_text().strip() / "manifest.json").is_file():
            return folder / pointer.read_text().strip()
        if found := newest(folder):
            return found[0]
    raise UserError(f"no checkpoint at {path}: give a step folder (…/checkpoints/step_000100) or a run's folder")


def newest(folder: Path) -> list[Path]:
    """Finished checkpoints of a checkpoints folder, newest first."""
    found = [p for p in folder.glob("step_*") if _STEP.search(p.name) and (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: int(_STEP.search(p.name).group(1)), reverse=True)  # type: ignore[union-attr]


def verify(path: Path, ranks: Ranks | None = None, only: tuple[str, ...] = ("",)) -> list[str]:
    """Names of files that are missing, resized or altered; the ranks share the reading.

    only: what the names of the files to look at begin with. Raises UserError for a checkpoint of another format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, written = manifest["files"], manifest.get("format")
        known = {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in files}
    except (OSError, ValueError, KeyError, TypeError):
        return ["manifest.json"]
    if "state.json" not in known or not any(name.startswith("weights/") for name in known):
        return ["manifest.json"]
    if written != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {written}, this version reads {FORMAT}: with the version that wrote it, "
            "vlm-nemo convert checkpoint=DIR out=HF; with this one, vlm-nemo convert hf=HF out=DIR"
        )
    wanted = [name for name in known if name.startswith(only)]
    bad = []
    for name in wanted if ranks is None else wanted[ranks.rank :: ranks.world]:
        file = path / name
        size, digest = known[name]
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
            bad.append(name)
    if ranks is None or ranks.world == 1:
        return bad
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, bad)
    return [name for names in gathered for name in names]


def check(path: Path, ranks: Ranks | None, only: tuple[str, ...] = ("",)) -> None:
    """Raises UserError that names the damaged files among those that are about to be read."""
    if bad := verify(path, ranks, only):
        raise UserError(f"checkpoint {path} is damaged: {', '.join(bad[:5])}; use an earlier step")


def resumable(folder: Path, ranks: Ranks) -> Saved | None:
    """The newest intact checkpoint of this run; None if it has none.

    A damaged one is named and set aside, and the one before it tried. Raises UserError if all are damaged.
    """
    # One rank looks: on a network file system the others may see an older list.
    found: list[Any] = [newest(folder) if ranks.main else None]
    dist.broadcast_object_list(found)
    for path in found[0]:
        bad = verify(path, ranks)
        if not bad:
            return read(path)
        if ranks.main:
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is damaged (%s) and now %s; trying the one before", path, ", ".join(bad[:3]), aside.name)
        dist.barrier()
    if found[0]:
        raise UserError(f"every checkpoint in {folder} is damaged; remove the folder to start afresh")
    return None


def read(path: Path) -> Saved:
    """The plain data of a checkpoint."""
    return Saved(path=path, state=json.loads((path / "state.json").read_text()))


def load_weights(path: Path, chunks: Sequence[nn.Module], *, skip_parts: Collection[str] = ()) -> None:
    """Fill the model from a checkpoint written at any layout; `check` its files first.

    skip_parts: parts that keep the weights they have.
    Raises UserError naming missing parts, missing tensors or other shapes.
    """
    reader = tensors.Reader(path / "weights")
    check_parts(path, reader, skip_parts)
    wanted = [p for p in local_parameters(chunks) if p.part not in skip_parts]
    with torch.no_grad():
        for local in wanted:
            for box, view in local.pieces(local.parameter.data):
                view.copy_(reader.box("weight", box))


def check_parts(path: Path, reader: tensors.Reader, fresh: Collection[str]) -> None:
    """Raises UserError naming a part of the model that the checkpoint lacks and that is not to start afresh."""
    if lacking := [part for part in PARTS if part not in reader.parts() and part not in fresh]:
        remedy = ",".join([*fresh, *lacking])
        raise UserError(
            f"checkpoint {path} has no {' and no '.join(lacking)}: train it from a fresh start with "
            f"checkpoint.reset=[{remedy}], or name a checkpoint that has it"
        )


def load_optimizer(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, updates: int) -> None:
    """Fill AdamW's state and the fp32 copies, at this layout, from a checkpoint of this run written at any layout.

    updates: how many the optimizer had applied; skipped steps do not count.
    """
    reader = tensors.Reader(path / "optimizer")
    refresh_masters(optimizer)
    by_parameter = {id(p.parameter): p for p in local_parameters(chunks)}
    for held in optimizer_slices(optimizer):
        local = by_parameter[id(held.parameter)]
        if held.has_copy:
            flat = reader.flat("master", local, held.start, held.stop)
            held.master.data.copy_(flat.view_as(held.master))
        if updates == 0:
            continue
        for kind in tensors.MOMENTS:
            flat = reader.flat(kind, local, held.start, held.stop).to(held.master.device)
            held.state[kind] = flat.view_as(held.master).contiguous()
        held.state["step"] = torch.tensor(float(updates), device=held.master.device)


def _prune(folder: Path, keep: int) -> None:
    for old in newest(folder)[keep:] if keep > 0 else []:
        doomed = old.with_name(f".{old.name}.old")
        old.rename(doomed)  # at once out of sight, so that an interrupted removal leaves no half checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def _fingerprint(root: Path, path: Path) -> dict[str, Any]:
    return {"file": str(path.relative_to(root)), "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    _sync(path)


def _sync(path: Path | None) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in memory."""
    if path is None:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
