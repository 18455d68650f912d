"""Weights of Hugging Face, a tensor at a time: into a model of any layout, and out of a checkpoint under hub names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.train import tensors
from vlm_nemo.types import UserError
from vlm_nemo.weights.config import model_config_of
from vlm_nemo.weights.hf_folder import HFFolder
from vlm_nemo.weights.names.languages import EMBEDDING, HEAD_NAME
from vlm_nemo.weights.names.rows import Entry
from vlm_nemo.weights.spelling import Name
from vlm_nemo.weights.tables import exported_vision, listed, naming_of, naming_of_part


def joined(folder: HFFolder, entry: Entry) -> Tensor:
    """One of our global tensors, from the folder's. Raises UserError where they cannot be one."""
    try:
        return entry.transform.join([folder.tensor((entry.part, name)) for name in entry.theirs], entry.sizes)
    except ValueError as why:
        raise UserError(f"{folder.path}: {', '.join(entry.theirs)}: {why}") from None


def load_hf_weights(folder: HFFolder, chunks: Sequence[nn.Module]) -> None:
    """Fill a built model of any layout, a tensor at a time. Must run inside `device.adapter()`.

    Raises UserError naming the tensors that are missing or of another shape.
    """
    cfg = model_config_of(folder)
    table = {entry.ours: entry for entry in folder.naming(cfg).entries(cfg, folder.parts)}
    parameters = local_parameters(chunks)
    wanted = {local.boxes[0].key for local in parameters}  # all boxes of a parameter are of one tensor
    if unnamed := wanted - set(table):
        lacking = sorted(set(PARTS) - set(folder.parts))
        raise UserError(
            f"{folder.path} has no weights of the model's {listed(unnamed)}"
            + (f": a {folder.architecture} has no {' and no '.join(lacking)}" if lacking else "")
        )
    with torch.no_grad():
        for local in parameters:
            key = local.boxes[0].key
            whole = joined(folder, table[key])
            for box, view in local.pieces(local.parameter.data):
                if tuple(whole.shape) != box.global_shape:
                    raise UserError(
                        f"{key} is {list(whole.shape)} in {folder.path} but {list(box.global_shape)} in the model"
                    )
                view.copy_(whole[box.slices])


def hf_tensors(step_folder: Path, cfg: ModelConfig, part: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors under hub names, one at a time, idle tensors included.

    cfg: the checkpoint's. part: vision or language alone, under the names of such a class; None = the whole model.
    The vision tower has the layers of `tables.exported_vision`.
    Raises UserError naming tensors that are not there or that the class has no name for.
    """
    reader = tensors.Reader(step_folder / "weights")
    naming = naming_of(cfg) if part is None else naming_of_part(cfg, part)[1]
    parts = reader.parts() & set(PARTS if part is None else (part,))
    stored = {key for key in reader.shapes("weight") if key.split(".", 1)[0] in parts}
    table = {entry.ours: entry for entry in naming.entries(cfg, parts)}
    if strange := stored - set(table):
        raise UserError(f"{step_folder}: no class of Hugging Face's that fits has a name for {listed(strange)}")
    for entry in table.values():
        whole = reader.whole("weight", entry.ours)
        for name, tensor in zip(entry.theirs, entry.transform.split(whole, entry.sizes), strict=True):
            yield naming.spelled(entry.part, name), tensor
    kept = kept_names(reader, parts)
    idle = set() if exported_vision(naming, cfg, kept) == cfg.vision else naming.idle_layers(cfg)
    for left, key in kept.items():
        if left == ("language", HEAD_NAME):  # a second copy of tied embeddings: as they are now, not as they came
            yield naming.spelled(*left), reader.whole("weight", EMBEDDING)
        elif left not in idle:
            yield naming.spelled(*left), reader.whole(tensors.UNUSED_KIND, key)
    if "vision" in parts and naming.tables["vision"].when_stood_in(cfg.vision):
        for stand_in in naming.tables["vision"].stand_ins:
            if ("vision", stand_in.theirs) not in kept:
                like = reader.whole("weight", stand_in.like)
                yield naming.spelled("vision", stand_in.theirs), torch.full_like(like, stand_in.value)


def kept_names(reader: tensors.Reader, parts: Collection[str] = PARTS) -> dict[Name, str]:
    """What a checkpoint keeps of the model that it came from, beside the weights: name -> key."""
    found = {}
    for key in reader.shapes(tensors.UNUSED_KIND):
        part, _, name = key.partition(".")
        if part in parts:
            found[part, name] = key
    return found
