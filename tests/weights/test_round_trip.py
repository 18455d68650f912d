"""Hugging Face -> ours -> Hugging Face gives back every bit, whatever the spelling, and transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.weights import twins
from vlm_nemo import cli
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.weights.config import model_config_of
from vlm_nemo.weights.hf_folder import HFFolder
from vlm_nemo.weights.names.languages import EMBEDDING, HEAD


def convert(*words: object) -> None:
    assert cli.main(["convert", *(str(word) for word in words)]) == 0


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the files have it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def hub_state(folder: Path) -> dict[str, Tensor]:
    """The same under hub names, whatever the spelling."""
    found = HFFolder(folder)
    return dict(found.hub_tensors(model_config_of(found)))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hub_spelling_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    twins.llava(tmp_path / "five", dtype=dtype)
    twins.respell(tmp_path / "five", tmp_path / "hub")
    for n, source in enumerate(("hub", "five")):
        convert(f"hf={tmp_path / source}", f"out={tmp_path}/ours{n}", "max_shard_gb=0.00002")
        assert checkpoint.verify(tmp_path / f"ours{n}") == []
        assert len(list((tmp_path / f"ours{n}" / "weights").glob("*_0*"))) > 3
        convert(f"checkpoint={tmp_path}/ours{n}", f"out={tmp_path}/back{n}", "max_shard_gb=0.00002")
    same(state(tmp_path / "hub"), state(tmp_path / "back0"))
    # The other spelling: the same tensors under hub names
    same(hub_state(tmp_path / "five"), state(tmp_path / "back1"))
    index = json.loads((tmp_path / "back0" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state(tmp_path / "hub"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state(tmp_path / "hub").values())
    assert json.loads((tmp_path / "back0" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_a_second_copy_of_tied_embeddings_stays_a_copy(tmp_path: Path) -> None:
    twins.llava(tmp_path / "hf", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    found = load_file(file)
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    save_file({**found, head: found[embedding].clone()}, file, {"format": "pt"})
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    assert HEAD not in tensors.Reader(tmp_path / "ours" / "weights").shapes("weight")
    # What training would do: the embedding moves on, what is kept beside the weights does not
    (part,) = (tmp_path / "ours" / "weights").glob("language_*")
    with safe_open(part, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(part)
    (name,) = (name for name in weights if EMBEDDING in name)
    save_file({**weights, name: weights[name] + 1}, part, metadata)
    (tmp_path / "ours" / "manifest.json").unlink()
    checkpoint.write_manifest(tmp_path / "ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    back = state(tmp_path / "back")
    assert torch.equal(back[embedding], found[embedding] + 1) and torch.equal(back[head], back[embedding])
