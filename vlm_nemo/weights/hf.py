"""Folders of Hugging Face: read a tensor at a time under hub names, into a model of any layout or out of a checkpoint.

safetensors only, one file or several with an index; nothing pickled is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.train import tensors
from vlm_nemo.types import UserError
from vlm_nemo.weights import llava
from vlm_nemo.weights.llava_config import model_config_of
from vlm_nemo.weights.shards import INDEX, SINGLE

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LlavaForConditionalGeneration": ("llava", PARTS),
    "CLIPModel": ("clip", ("vision",)),
    "CLIPVisionModel": ("clip", ("vision",)),
    "CLIPVisionModelWithProjection": ("clip", ("vision",)),
    "LlamaForCausalLM": ("llama", ("language",)),
}
"""Architecture, as config.json names it -> its family of names and the parts of ours that it gives."""

MODEL_TYPES = {
    "llava": "LlavaForConditionalGeneration",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "llama": "LlamaForCausalLM",
}
"""For a config.json that names no architecture."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HFFolder:
    """A model saved by `save_pretrained`, or downloaded from the hub; tensors go by their hub names."""

    path: Path
    config: dict[str, Any]
    """config.json"""
    family: str
    """llava | clip | llama"""
    parts: tuple[str, ...]
    """The parts of our model that it gives."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError: no such folder, another architecture, pickled weights, a missing or damaged file."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.architecture = (self.config.get("architectures") or [None])[0] or MODEL_TYPES.get(
            self.config.get("model_type", ""), str(self.config.get("model_type"))
        )
        if self.architecture not in FAMILIES:
            raise UserError(f"{self.path} holds a {self.architecture}; convert reads {', '.join(FAMILIES)}")
        self.family, self.parts = FAMILIES[self.architecture]
        self._where: dict[str, tuple[Any, str]] = {}  # hub name -> (open file, the name in it)
        for file, names in self._files():
            for name in names:
                hub = llava.hub_name(name, self.family)
                if hub is None:
                    continue
                if llava.part_of(hub) not in self.parts or hub in self._where:
                    raise UserError(
                        f"{self.path}: tensor {name} has no place in a {self.architecture}, or has it twice"
                    )
                self._where[hub] = (file, name)

    def names(self) -> list[str]:
        """Hub names of the tensors, sorted."""
        return sorted(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now. Raises UserError naming it if it is not there."""
        file, key = self._find(name)
        return file.get_tensor(key)

    def dtype(self, name: str) -> str:
        """Type of a tensor, as torch spells it, without reading the tensor."""
        file, key = self._find(name)
        return DTYPES.get(file.get_slice(key).get_dtype(), "other")

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        file, key = self._find(name)
        return tuple(file.get_slice(key).get_shape())

    def tied(self) -> bool:
        """Whether embedding and head are one tensor. Raises UserError where config.json and the tensors disagree."""
        text = self.config.get("text_config") or {}
        says = bool(self.config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))
        if not says or llava.HUB_HEAD not in self._where:
            return says
        if torch.equal(self.tensor(llava.HUB_HEAD), self.tensor("language_model.model.embed_tokens.weight")):
            return True
        raise UserError(
            f"{self.path}/config.json: tie_word_embeddings=True, but its lm_head differs from its embedding; "
            "set it to false, or remove lm_head"
        )

    def _find(self, name: str) -> tuple[Any, str]:
        if name not in self._where:
            raise UserError(f"{self.path} has no tensor {name}, which its config.json asks for")
        return self._where[name]

    def _files(self) -> Iterator[tuple[Any, list[str]]]:
        """Every file of weights, opened, and the tensors that it is to give."""
        if (self.path / SINGLE).is_file():
            file = _open(self.path / SINGLE)
            yield file, list(file.keys())
            return
        if not (self.path / INDEX).is_file():
            raise UserError(_no_weights(self.path))
        where = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(f"{self.path / INDEX} has no weight_map; copy it again")
        by_file: dict[str, list[str]] = {}
        for name, shard in where.items():
            by_file.setdefault(str(shard), []).append(name)
        for shard, names in sorted(by_file.items()):
            if Path(shard).name != shard:
                raise UserError(f"{self.path / INDEX} names {shard!r}, which is not a file of its folder")
            file = _open(self.path / shard)
            if lacking := set(names) - set(file.keys()):
                raise UserError(f"{self.path / shard} has no tensor {min(lacking)}, which {INDEX} promises")
            yield file, names


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing; the index names it: copy the folder again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None


def _no_weights(path: Path) -> str:
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{path} holds pickled weights ({pickled[0]}), which can run code and are not opened; load it in a safe "
            "place with transformers and save_pretrained it again: that writes safetensors"
        )
    return f"{path} has neither {SINGLE} nor {INDEX}"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises UserError naming the file that is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a folder saved by save_pretrained") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def joined(folder: HFFolder, entry: llava.Entry) -> Tensor:
    """One of our global tensors, from the folder's."""
    return entry.transform.join([folder.tensor(name) for name in entry.hub], entry.sizes)


def load_hf_weights(folder: HFFolder, chunks: Sequence[nn.Module]) -> None:
    """Fill a built model of any layout, a tensor at a time. Must run inside `device.adapter()`.

    Raises UserError naming a tensor that is missing or of another shape.
    """
    table = {entry.ours: entry for entry in llava.entries(model_config_of(folder), folder.parts)}
    with torch.no_grad():
        for local in local_parameters(chunks):
            key = local.boxes[0].key  # all boxes of a parameter are of one tensor
            if key not in table:
                lacking = sorted(set(PARTS) - set(folder.parts))
                raise UserError(
                    f"{folder.path} has no weights of the model's {key}"
                    + (f": a {folder.architecture} has no {' and no '.join(lacking)}" if lacking else "")
                )
            whole = joined(folder, table[key])
            for box, view in local.pieces(local.parameter.data):
                if tuple(whole.shape) != box.global_shape:
                    raise UserError(
                        f"{key} is {list(whole.shape)} in {folder.path} but {list(box.global_shape)} in the model"
                    )
                view.copy_(whole[box.slices])


def hf_tensors(step_folder: Path, cfg: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors under hub names, one at a time: each part that it holds, idle tensors included.

    cfg: the checkpoint's. The vision tower has the layers of `llava.exported_vision(cfg.vision, …)`.
    Raises UserError naming a tensor that is not there or that LLaVA-1.5 has no name for.
    """
    reader = tensors.Reader(step_folder / "weights")
    stored = reader.shapes("weight")
    table = {entry.ours: entry for entry in llava.entries(cfg)}
    if strange := sorted(set(stored) - set(table)):
        raise UserError(f"{step_folder}: tensor {strange[0]} has no name in Hugging Face's LLaVA-1.5")
    parts = reader.parts()
    for entry in table.values():
        if entry.part in parts:
            whole = reader.whole("weight", entry.ours)
            yield from zip(entry.hub, entry.transform.split(whole, entry.sizes), strict=True)
    kept = {key.partition(".")[2]: key for key in reader.shapes(tensors.UNUSED_KIND)}
    whole_tower = llava.exported_vision(cfg, kept) == cfg.vision
    for name, key in kept.items():
        if name == llava.HUB_HEAD:  # a second copy of tied embeddings: as they are now, not as they came
            yield name, reader.whole("weight", llava.EMBEDDING)
        elif whole_tower or name not in llava.idle_layers(cfg):
            yield name, reader.whole(tensors.UNUSED_KIND, key)
    if "vision" in parts and f"{llava.POST_NORM}.weight" not in kept:
        # A tower that was trained here has none; CLIP's class wants one, and LLaVA never asks for its output
        like = reader.whole("weight", "vision.pre_norm.weight")
        yield f"{llava.POST_NORM}.weight", torch.ones_like(like)
        yield f"{llava.POST_NORM}.bias", torch.zeros_like(like)
