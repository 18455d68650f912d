"""Checkpoints of a run: save them, find the one to go on from, load them at any layout. No pickle.

What lies on the disk is described in manifest.py, what the tensor files hold in tensors.py, who writes which part of it
in shares.py, and how it is written while the run goes on in saver.py.

Reading: every file is read once to compare its hash, by one rank of the whole job; then each rank opens what holds its
boxes and reads these alone, so ranks that hold the same boxes read the same bytes, which the page cache of a machine
gives them after the first. Nothing is sent between ranks.
"""

from __future__ import annotations

import json
import logging
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
from vlm_nemo.train import manifest, tensors
from vlm_nemo.train.manifest import FORMAT, find, newest, step_folder, write_manifest
from vlm_nemo.train.optim import optimizer_slices, refresh_masters
from vlm_nemo.train.saver import Saver
from vlm_nemo.types import UserError

__all__ = ["FORMAT", "find", "newest", "step_folder", "write_manifest"]

log = logging.getLogger(__name__)


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
    """Write checkpoints/step_NNNNNN once, collectively; a run that writes several has a Saver."""
    with Saver(folder, ranks=ranks, chunks=chunks, optimizer=optimizer, write_extras=write_extras, keep=keep) as saver:
        return saver.save(step, state, wait=True)


def verify(path: Path, ranks: Ranks | None = None, only: tuple[str, ...] = ("",)) -> list[str]:
    """Names of files that are missing, resized or altered; the ranks share the reading.

    only: what the names of the files to look at begin with. Raises UserError for a checkpoint of another format.
    """
    try:
        files = [entry for name, entry in manifest.read_manifest(path).files.items() if name.startswith(only)]
    except manifest.Damaged:
        return [manifest.MANIFEST]
    bad = manifest.damaged(path, files if ranks is None else files[ranks.rank :: ranks.world])
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
