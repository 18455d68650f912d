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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import tensors
from vlm_nemo.train.optim import optimizer_slices, refresh_masters
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{6,})$")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint found on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


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
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, hashes)
    if ranks.main:
        write_extras(draft)
        _write_json(draft / "state.json", {**state, "step": step})
        known = {entry["file"]: entry for entries in gathered for entry in entries}
        others = [p for p in sorted(draft.rglob("*")) if p.is_file() and str(p.relative_to(draft)) not in known]
        known.update({entry["file"]: entry for entry in (_fingerprint(draft, p) for p in others)})
        _write_json(draft / "manifest.json", {"format": 1, "files": [known[k] for k in sorted(known)]})
        _publish(draft, final)
        _prune(folder, keep)
    dist.barrier()
    return final


def _publish(draft: Path, final: Path) -> None:
    """Make the finished draft the newest checkpoint."""
    draft.rename(final)
    _sync_folder(final.parent)
    pointer = final.parent / ".latest.draft"
    pointer.write_text(final.name + "\n")
    pointer.replace(final.parent / "latest")
    _sync_folder(final.parent)


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


def verify(path: Path, ranks: Ranks | None = None) -> list[str]:
    """Names of files that are missing, resized or altered; the ranks share the reading."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    share = files if ranks is None else files[ranks.rank :: ranks.world]
    bad = []
    for entry in share:
        file = path / entry["file"]
        if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            bad.append(entry["file"])
    if ranks is None or ranks.world == 1:
        return bad
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, bad)
    return [name for names in gathered for name in names]


def resumable(folder: Path, ranks: Ranks) -> Saved | None:
    """The newest intact checkpoint of this run. A damaged one is named and set aside, and the one before it tried."""
    for path in newest(folder):
        bad = verify(path, ranks)
        if not bad:
            return read(path)
        if ranks.main:
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is damaged (%s) and now %s; trying the one before", path, ", ".join(bad[:3]), aside.name)
        dist.barrier()
    return None


def read(path: Path) -> Saved:
    """The plain data of a checkpoint."""
    return Saved(path=path, state=json.loads((path / "state.json").read_text()))


def load_weights(path: Path, chunks: Sequence[nn.Module], ranks: Ranks, *, skip_parts: Sequence[str] = ()) -> None:
    """Fill the model from a checkpoint written at any layout, after checking its hashes.

    skip_parts: parts (first word of a parameter's name) that keep the weights they have.
    Raises UserError naming damaged files, missing tensors or other shapes.
    """
    bad = verify(path, ranks)
    if bad:
        raise UserError(f"checkpoint {path} is damaged: {', '.join(bad[:5])}; use an earlier step")
    reader = tensors.Reader(path / "weights")
    wanted = [p for p in local_parameters(chunks) if p.part not in skip_parts]
    with torch.no_grad():
        for local in wanted:
            for box, view in local.pieces(local.parameter.data):
                view.copy_(reader.box("weight", box))


def load_optimizer(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, step: int) -> None:
    """Fill AdamW's state and the fp32 copies, at this layout, from a checkpoint of this run written at any layout."""
    reader = tensors.Reader(path / "optimizer")
    refresh_masters(optimizer)
    by_parameter = {id(p.parameter): p for p in local_parameters(chunks)}
    for held in optimizer_slices(optimizer):
        local = by_parameter[id(held.parameter)]
        kinds = [*tensors.MOMENTS, *(["master"] if held.has_copy else [])]
        for kind in kinds:
            flat = reader.flat(kind, local, held.start, held.stop).to(held.master.device)
            if kind == "master":
                held.master.data.copy_(flat.view_as(held.master))
            else:
                held.state[kind] = flat.view_as(held.master).contiguous()
        held.state["step"] = torch.tensor(float(step), device=held.master.device)


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
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
