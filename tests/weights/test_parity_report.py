"""`parity=true`: both models asked about the same image, printed and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.families.pairs import png
from tests.weights import zoo
from tests.weights.test_parts import save_clip
from tests.weights.test_round_trip import convert
from vlm_nemo import cli


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "mllama"])
def test_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    zoo.save(tmp_path / "hf", name)
    (tmp_path / "cat.png").write_bytes(png(19, 33, 0))
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours", "parity=true")
    assert "parity with transformers (fp32, " in capsys.readouterr().out
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", "parity=true", f"image={tmp_path}/cat.png")
    for folder in ("ours", "back"):
        found = json.loads((tmp_path / folder / "parity.json").read_text())
        assert found["max_dlogit"] < 1e-4 < 1 < found["max_logit"]
        assert found["argmax_agreement"] == 1


def test_a_difference_shows(tmp_path: Path) -> None:
    from vlm_nemo.train import checkpoint
    from vlm_nemo.verbs.convert import _parity

    zoo.save(tmp_path / "hf", "llava")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    _parity(tmp_path / "hf", checkpoint.find(str(tmp_path / "ours")), tmp_path, None)
    assert json.loads((tmp_path / "parity.json").read_text())["max_dlogit"] > 1e-3


def test_what_has_no_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path / "clip", "CLIPVisionModel")
    words = ["convert", f"hf={tmp_path}/clip", f"out={tmp_path}/ours"]
    assert cli.main([*words, "parity=true"]) == 2
    assert "parity=true compares whole models" in capsys.readouterr().err
    assert cli.main([*words, "image=cat.jpg"]) == 2
    assert "image=cat.jpg is for parity=true" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
