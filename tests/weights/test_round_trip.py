"""Hugging Face -> ours -> Hugging Face gives back every bit, whatever the spelling, and transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.weights import twins
from vlm_nemo import cli
from vlm_nemo.train import checkpoint
from vlm_nemo.weights.hf import HFFolder


def convert(*words: object) -> None:
    assert cli.main(["convert", *(str(word) for word in words)]) == 0


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the files have it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


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
        assert len(list((tmp_path / f"ours{n}" / "weights").glob("part_*"))) > 3
        convert(f"checkpoint={tmp_path}/ours{n}", f"out={tmp_path}/back{n}", "max_shard_gb=0.00002")
    same(state(tmp_path / "hub"), state(tmp_path / "back0"))
    # The other spelling: the same tensors under hub names
    folder = HFFolder(tmp_path / "five")
    same({name: folder.tensor(name) for name in folder.names()}, state(tmp_path / "back1"))
    index = json.loads((tmp_path / "back0" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state(tmp_path / "hub"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state(tmp_path / "hub").values())
    assert json.loads((tmp_path / "back0" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
