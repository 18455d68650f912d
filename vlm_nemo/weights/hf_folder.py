"""A folder of Hugging Face: which tensors it holds, under which names, and one of them at a time.

safetensors only, one file or several with an index; nothing pickled is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.types import UserError
from vlm_nemo.weights.alone import ALONE, MODEL_TYPES, left_out
from vlm_nemo.weights.configs.languages import TIED
from vlm_nemo.weights.families import FAMILIES, REMOTE, family_of
from vlm_nemo.weights.names.languages import EMBEDDING_NAME, HEAD_NAME
from vlm_nemo.weights.names.projectors import PROJECTORS
from vlm_nemo.weights.names.rows import Entry
from vlm_nemo.weights.names.towers import TOWERS
from vlm_nemo.weights.shapes import expected_shapes
from vlm_nemo.weights.shards import INDEX, SINGLE
from vlm_nemo.weights.spelling import PREFIXES, Name, Prefixes, understood
from vlm_nemo.weights.tables import Naming, listed, naming_of, naming_of_class

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HFFolder:
    """A model saved by `save_pretrained`, or downloaded from the hub; a tensor goes by (its part, its name there)."""

    path: Path
    config: dict[str, Any]
    """config.json"""
    architecture: str
    """Its class, as Hugging Face names it."""
    family: str | None
    """Name in `families.FAMILIES`; None for a part alone."""
    remote: bool
    """Whether it is spelled as other people's own code has it."""
    parts: tuple[str, ...]
    """The parts of our model that it gives."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError: no such folder, another architecture, pickled weights, a missing or damaged file."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.architecture = (self.config.get("architectures") or [None])[0] or MODEL_TYPES.get(
            self.config.get("model_type", ""), str(self.config.get("model_type"))
        )
        self.remote = self.architecture in REMOTE
        self.family = REMOTE.get(self.architecture) or family_of(self.architecture)
        if self.family is None and self.architecture not in ALONE:
            known = [*(family.architecture for family in FAMILIES.values()), *ALONE]
            raise UserError(f"{self.path} holds a {self.architecture}; convert reads {', '.join(known)}")
        self.parts = (ALONE[self.architecture].part,) if self.family is None else PARTS
        self._where: dict[Name, tuple[Any, str]] = {}  # -> (open file, the key in it)
        prefixes, strange = self._prefixes(), []
        for file, keys in self._files():
            for key in keys:
                if self.family is None and left_out(ALONE[self.architecture], key):
                    continue
                name = understood(prefixes, key)
                if name is None or name in self._where:
                    strange.append(key)
                else:
                    self._where[name] = (file, key)
        if strange:
            raise UserError(
                f"{self.path}: {_tensors(strange)} that a {self.architecture} has no place for, or that are there twice"
            )

    def naming(self, cfg: ModelConfig) -> Naming:
        """How its tensors are named. cfg: what `model_config_of` made of it."""
        if self.family is None:
            return naming_of_class(self.architecture)
        naming = naming_of(cfg)
        if not self.remote:
            return naming
        tables = {"vision": TOWERS["internvit_remote"], "projector": PROJECTORS["internvl_remote"]}
        return replace(naming, tables={**naming.tables, **tables}, prefixes=self._prefixes())

    def _prefixes(self) -> Prefixes:
        if self.family is None:
            return ALONE[self.architecture].prefixes
        return PREFIXES["internvl_remote"] if self.remote else FAMILIES[self.family].prefixes

    def names(self) -> list[Name]:
        """Of the tensors, sorted."""
        return sorted(self._where)

    def tensor(self, name: Name) -> Tensor:
        """One tensor, read now. Raises UserError naming it if it is not there."""
        file, key = self._find(name)
        return file.get_tensor(key)

    def hub_tensors(self, cfg: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """All tensors under hub names, one at a time. cfg: what `model_config_of` made of the folder."""
        naming = naming_of(cfg)
        return ((naming.spelled(*name), self.tensor(name)) for name in self.names())

    def dtype(self, name: Name) -> str:
        """Type of a tensor, as torch spells it, without reading the tensor."""
        file, key = self._find(name)
        return DTYPES.get(file.get_slice(key).get_dtype(), "other")

    def shape(self, name: Name) -> tuple[int, ...]:
        """Its shape, without reading it."""
        file, key = self._find(name)
        return tuple(file.get_slice(key).get_shape())

    def tied(self) -> bool:
        """Whether embedding and head are one tensor. Raises UserError where config.json and the tensors disagree."""
        text = self.config.get("text_config") or self.config.get("llm_config") or {}
        said = [c["tie_word_embeddings"] for c in (self.config, text) if c.get("tie_word_embeddings") is not None]
        silent = FAMILIES[self.family].tied if self.family else ALONE[self.architecture].kind in TIED
        # A family that ties where config.json's top does not say: then the tensors do
        open_question = silent and self.config.get("tie_word_embeddings") is None
        says = silent if open_question else any(said)
        head, embedding = ("language", HEAD_NAME), ("language", EMBEDDING_NAME)
        if not says or head not in self._where:
            return says
        if torch.equal(self.tensor(head), self.tensor(embedding)):
            return True
        if open_question:
            return False
        raise UserError(
            f"{self.path}/config.json: tie_word_embeddings=True, but its lm_head differs from its embedding; "
            "set it to false, or remove lm_head"
        )

    def check(self, cfg: ModelConfig) -> None:
        """That every tensor of the model is there, in its shape, and that no other is. One error that lists them."""
        naming = self.naming(cfg)
        wanted = {(entry.part, name): entry for entry in naming.entries(cfg, self.parts) for name in entry.theirs}
        missing = [naming.spelled(*name) for name in wanted if name not in self._where]
        strange = [self._where[name][1] for name in naming.leftovers(self.names(), cfg)[1]]
        faults = []
        if missing:
            faults.append(f"it lacks {_tensors(missing)}")
        if strange:
            faults.append(f"it has {_tensors(strange)} that a {self.architecture} of this configuration has not")
        if not faults:
            wrong = [w for entry in naming.entries(cfg, self.parts) for w in _misshapen(self, entry, cfg, naming)]
            if wrong:
                faults.append(f"tensors of other shapes than its config.json says: {listed(wrong)}")
        if faults:
            raise UserError(f"{self.path}: {'; '.join(faults)}")

    def _find(self, name: Name) -> tuple[Any, str]:
        if name not in self._where:
            raise UserError(f"{self.path} has no tensor {name[1]} of the {name[0]}, which its config.json asks for")
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


def _misshapen(folder: HFFolder, entry: Entry, cfg: ModelConfig, naming: Naming) -> list[str]:
    """What is wrong with the shapes of the tensors of an entry."""
    wanted = zip(entry.theirs, expected_shapes(entry, cfg), strict=True)
    found = [(name, folder.shape((entry.part, name)), should) for name, should in wanted]
    return [
        f"{naming.spelled(entry.part, name)} {list(has)} instead of {list(should)}"
        for name, has, should in found
        if has != should
    ]


def _tensors(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({listed(keys)})"
