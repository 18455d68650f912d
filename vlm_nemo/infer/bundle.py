"""Read an export: its manifest, checked file by file, and what it says about the model. No torch here.

manifest.json            everything below, with a SHA-256 of every file
tokenizer.json …         as the model was trained with
embedding.safetensors    token embeddings; the host looks them up and puts images in their places
vision/model.onnx        pixels -> image embeddings
llm/model.onnx           embeddings -> logits, the cache updated in place
engines/<name>/          the same two graphs compiled, each with build.json
golden/                  inputs and logits of the model that was exported
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.spec import ImageSpec, image_spec, view_tokens
from vlm_nemo.types import UserError

FORMAT = "vlm_nemo export 2"
MANIFEST = "manifest.json"
STORAGE: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # numpy has no bf16; the host only moves such numbers, it never adds them
}
"""How the host holds numbers of a precision."""
_SAFETENSORS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An export folder whose manifest has been read."""

    folder: Path
    precision: str
    """fp32 | bf16 | fp16: weights, activations and cache."""
    slots: int
    """Sequences that the compiled engines take at once."""
    capacity: int
    """Tokens of one sequence: the length of the cache in the graphs."""
    template: str
    """A key of vlm_nemo.data.chat.TEMPLATES."""
    image: ImageSpec
    image_token: int
    """Placeholder id."""
    layers: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    """Rows of the head, padding included."""
    manifest: dict[str, Any]

    @property
    def vision_graph(self) -> Path:
        return self.folder / "vision" / "model.onnx"

    @property
    def language_graph(self) -> Path:
        return self.folder / "llm" / "model.onnx"

    @property
    def image_tokens(self) -> int:
        """Embeddings of an image: the graphs know square views alone."""
        return view_tokens(self.image, self.image.grid)

    @property
    def storage(self) -> np.dtype[Any]:
        """numpy's type for activations and cache."""
        return STORAGE[self.precision]

    def cache_shape(self, slots: int) -> tuple[int, int, int, int]:
        """Of one layer's keys, or values."""
        return slots, self.kv_heads, self.capacity, self.head_size

    def embedding(self) -> NDArray[Any]:
        """[V, D] in `storage`. Raises UserError if the file does not hold what the manifest says."""
        from safetensors import SafetensorError, deserialize

        path = self.folder / "embedding.safetensors"
        try:
            (tensor,) = (found for name, found in deserialize(path.read_bytes()) if name == "embedding")
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if tensor["dtype"] != _SAFETENSORS[self.precision]:
            raise UserError(f"{path} holds {tensor['dtype']}, but {MANIFEST} says {self.precision}")
        return np.frombuffer(tensor["data"], dtype=self.storage).reshape(tensor["shape"])

    def at(self, folder: Path, precision: str | None = None) -> Bundle:
        """The same model whose graphs, embeddings and engines lie in `folder`, in another precision if one is given."""
        return replace(self, folder=folder, precision=precision or self.precision)

    def engines(self) -> list[Engines]:
        """The compiled engines that the manifest knows, by name."""
        listed = sorted(n for n in self.manifest["files"] if n.startswith("engines/") and n.endswith("/build.json"))
        return [Engines.read((self.folder / name).parent) for name in listed]


@dataclass(frozen=True, kw_only=True)
class Engines:
    """A folder of compiled engines and how they were built."""

    folder: Path
    backend: str
    """tensorrt | tensorrt_rtx"""
    version: str
    """The backend's; an engine runs with this version only."""
    compute_capability: int
    """89 = SM 8.9"""
    precision: str
    slots: int
    capacity: int
    image_batch: int
    """Images that the vision engine takes at once."""

    @classmethod
    def read(cls, folder: Path) -> Engines:
        try:
            build = json.loads((folder / "build.json").read_text(encoding="utf-8"))
            return cls(
                folder=folder,
                backend=build["backend"],
                version=build["version"],
                compute_capability=build["compute_capability"],
                precision=build["precision"],
                slots=build["slots"],
                capacity=build["capacity"],
                image_batch=build["image_batch"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'build.json'} is not the description of an engine: {error}") from None


def open_bundle(folder: str | Path, *, skip: Collection[str] = ("golden/",)) -> Bundle:
    """Read an export and compare every file with its SHA-256.

    skip: beginnings of names that are not about to be read (engines of another backend, graphs where an engine
    runs). Raises UserError for what is not an export, or names the damaged files.
    """
    bundle = read_manifest(folder)
    bad = [
        name
        for name, entry in bundle.manifest["files"].items()
        if not name.startswith(tuple(skip)) and not _sound(bundle.folder, name, entry)
    ]
    if bad:
        raise UserError(f"export {folder} is damaged: {', '.join(bad[:5])}; export again")
    return bundle


def read_manifest(folder: str | Path) -> Bundle:
    """Read an export without looking at its files. Raises UserError for what is not an export."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not an export: it has no {MANIFEST}; make one with vlm-nemo export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} is of format {manifest['format']!r}, this version reads {FORMAT!r}; export again")
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["sha256"])
        return _bundle(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None


def _bundle(folder: Path, manifest: dict[str, Any]) -> Bundle:
    image, model = manifest["image"], manifest["model"]
    if manifest["precision"] not in STORAGE:
        raise ValueError(f"precision {manifest['precision']!r}")
    return Bundle(
        folder=folder,
        precision=manifest["precision"],
        slots=manifest["slots"],
        capacity=manifest["capacity"],
        template=manifest["template"],
        image=image_spec(
            LayoutConfig(**image["layout"]),
            size=image["size"],
            patch=image["patch"],
            class_token=image["class_token"],
            mean=tuple(image["mean"]),
        ),
        image_token=manifest["image_token"],
        layers=model["layers"],
        kv_heads=model["kv_heads"],
        head_size=model["head_size"],
        hidden_size=model["hidden_size"],
        vocab_size=model["vocab_size"],
        manifest=manifest,
    )


def _sound(folder: Path, name: str, entry: dict[str, Any]) -> bool:
    path = folder / name
    inside = path.resolve().is_relative_to(folder.resolve())
    return inside and path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
