"""A folder of Hugging Face, or one a part, to a checkpoint folder of ours. One tensor and one file in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.train.tensors import UNUSED_FILE, UNUSED_KIND, Chunk, whole_chunk
from vlm_nemo.types import UserError
from vlm_nemo.weights.config import model_config_of
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.hf import joined
from vlm_nemo.weights.hf_folder import HFFolder
from vlm_nemo.weights.names.languages import EMBEDDING, HEAD
from vlm_nemo.weights.shards import cast, in_shards, new_folder
from vlm_nemo.weights.words import import_tokenizer, rows_needed, template_of

MODEL_PART = "model.yaml"
"""The model as a file of conf/model/, for a composition of one's own to be trained."""

MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""Template -> special tokens of a decoder that was taught with it."""


def to_checkpoint(
    paths: Sequence[str],
    out: Path,
    *,
    dtype: torch.dtype | None,
    max_bytes: int,
    feature_layer: int | None,
    template: str | None,
    say: Callable[[str], None],
) -> None:
    """Write `out`, a step folder at step 0 of what the folders give together.

    dtype: of the weights; None = each as it is. feature_layer: of a vision tower that stands alone. template: a name in
    data.chat.TEMPLATES; None = the one that a folder's chat template is, else as `_usual` says.
    Raises UserError for folders that do not fit together and for what our model does not do.
    """
    folders = [HFFolder(path) for path in paths]
    _check_parts(folders)
    cfg = model_config_of(*folders, feature_layer=feature_layer)
    for folder in folders:
        folder.check(cfg)
    wordy = next((f for f in folders if "language" in f.parts), None)
    with new_folder(out) as draft:
        grown = cfg.language.vocab_size
        if wordy is not None:
            added = import_tokenizer(wordy.path, draft / "tokenizer", _image_id(wordy))
            tokenizer = Tokenizer(draft / "tokenizer")
            grown = _rows_for(tokenizer.vocab_size, cfg, wordy)
            if added or grown > cfg.language.vocab_size:
                say(_growth(added, cfg.language.vocab_size, grown))
        chosen = template or next((t for f in folders if (t := template_of(f.path))), None)
        chosen = chosen or _usual(folders, tokenizer if wordy is not None else None)
        (draft / "weights").mkdir()
        # A file holds one part alone, so that a run which does not train that part can share it
        numbers = count(1)
        for part, items in groupby(_weights(folders, cfg, grown, dtype), key=lambda item: item[0].key.split(".", 1)[0]):
            for shard in in_shards(items, max_bytes):
                tensors.write(draft / "weights" / f"{part}_{next(numbers):05d}.safetensors", shard)
                shard.clear()
        tensors.write(draft / "weights" / UNUSED_FILE, _unused(folders, cfg))
        cfg.language.vocab_size = grown
        stored = str(dtype).removeprefix("torch.") if dtype else _dtype(folders)
        precision = "fp32" if stored in ("float32", "float64") else "bf16"
        saved = {
            "origin": [str(folder.path) for folder in folders],
            "precision": precision,
            "model": asdict(cfg),
            "data": {"tokenizer": f"{out}/tokenizer" if wordy else "", "template": chosen},
        }
        (draft / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")
        (draft / MODEL_PART).write_text(_model_part(cfg, folders), encoding="utf-8")
        (draft / "state.json").write_text(json.dumps({"step": 0, "updates": 0}) + "\n", encoding="utf-8")
        checkpoint.write_manifest(draft)
    parts = [part for folder in folders for part in folder.parts]
    say(f"wrote {out}: {', '.join(parts)}; {stored} weights that run in {precision}, template {chosen}")
    if lacking := [part for part in PARTS if part not in parts]:
        say(f"it has no {' and no '.join(lacking)}: train with checkpoint.reset=[{','.join(lacking)}]")


def _model_part(cfg: ModelConfig, folders: Sequence[HFFolder]) -> str:
    """What differs from our defaults, as a file of conf/model/ says it."""
    names = " and ".join(str(folder.path.resolve().name) for folder in folders)
    return f"# {names}, as vlm-nemo convert read them.\n" + yaml.safe_dump(
        _differing(asdict(cfg), asdict(ModelConfig())), sort_keys=False
    )


def _differing(tree: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What of a tree is not as usual."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and usual[key]:
            if below := _differing(value, usual[key]):
                found[key] = below
        elif value != usual[key]:
            found[key] = value
    return found


def _check_parts(folders: Sequence[HFFolder]) -> None:
    giver: dict[str, HFFolder] = {}
    for folder in folders:
        for part in folder.parts:
            if part in giver:
                raise UserError(f"{giver[part].path} and {folder.path} both give the {part}; name one of them")
            giver[part] = folder


def _image_id(folder: HFFolder) -> int | None:
    """The placeholder that a whole model's config.json names."""
    if folder.family is None:
        return None
    return folder.config.get("image_token_id", folder.config.get("image_token_index"))


def _rows_for(tokens: int, cfg: ModelConfig, folder: HFFolder) -> int:
    """Rows that embedding and head share, for a tokenizer of so many tokens."""
    rows, more = cfg.language.vocab_size, cfg.language.input_tokens
    if tokens > rows + more > rows:
        raise UserError(
            f"{folder.path}: its tokenizer has {tokens} tokens, its embedding {rows + more} rows of which the last "
            f"{more} are not in the head: it cannot grow; take tokens out of tokenizer.json"
        )
    return rows if more else rows_needed(tokens, rows)


def _growth(added: Sequence[str], rows: int, grown: int) -> str:
    what = f"added {' and '.join(added)} to the tokenizer" if added else "the tokenizer has more tokens than rows"
    if grown == rows:
        return f"{what}; the embedding's {rows} rows have room for it"
    return f"{what}; embedding and head grow from {rows} to {grown} rows, each new one the mean of the others"


def _weights(
    folders: Sequence[HFFolder], cfg: ModelConfig, rows: int, dtype: torch.dtype | None
) -> Iterator[tuple[Chunk, Tensor]]:
    for folder in folders:
        for entry in folder.naming(cfg).entries(cfg, folder.parts):
            whole = joined(folder, entry)
            if entry.ours in (EMBEDDING, HEAD):
                whole = _grow(whole, rows + (cfg.language.input_tokens if entry.ours == EMBEDDING else 0))
            yield whole_chunk("weight", entry.ours, tuple(whole.shape)), cast(whole, dtype)


def _grow(table: Tensor, rows: int) -> Tensor:
    """More rows, each the mean of those that there are: the new tokens then say nothing in particular."""
    if rows == table.shape[0]:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(rows - table.shape[0], -1)))


def _unused(folders: Sequence[HFFolder], cfg: ModelConfig) -> Iterator[tuple[Chunk, Tensor]]:
    """What our model has no place for, as it is."""
    for folder in folders:
        for part, name in folder.naming(cfg).leftovers(folder.names(), cfg)[0]:
            tensor = folder.tensor((part, name))
            yield whole_chunk(UNUSED_KIND, f"{part}.{name}", tuple(tensor.shape)), tensor


def _usual(folders: Sequence[HFFolder], tokenizer: Tokenizer | None) -> str:
    """The template of a family; where parts come alone that of the decoder's special tokens, else LLaVA-1.5's."""
    if family := next((folder.family for folder in folders if folder.family), None):
        return FAMILIES[family].template
    known = tokenizer.names if tokenizer is not None else frozenset()
    return next((template for template, marks in MARKS.items() if known.issuperset(marks)), "vicuna")


def _dtype(folders: Sequence[HFFolder]) -> str:
    """The type of the language model's weights, which are most of them; of the tower's where it stands alone."""
    main = max(folders, key=lambda folder: "language" in folder.parts)
    return main.dtype(next(name for name in main.names() if name[0] == main.parts[-1]))
