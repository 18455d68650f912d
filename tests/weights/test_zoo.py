"""Every family: Hugging Face -> ours -> Hugging Face is the same to the bit, and transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.weights import zoo
from tests.weights.test_round_trip import convert, same, state
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.tables import naming_of


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_family_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    dtype = torch.bfloat16 if name in ("llava_next", "ovis2") else torch.float32
    original = zoo.save(tmp_path / "hf", name, dtype)
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    cfg = model_config(checkpoint_config(tmp_path / "ours"))
    assert cfg.family == zoo.config(name).family
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    naming = naming_of(cfg)
    given = {naming.spelled(*naming.understood(key)): tensor for key, tensor in state(tmp_path / "hf").items()}
    same(given, state(tmp_path / "back"))
    assert not any(key.startswith("model.vision_tower.vision_model") for key in given)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype=dtype
    )
    assert type(model).__name__ == FAMILIES[cfg.family].architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    same(dict(original.state_dict()), dict(model.state_dict()))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert before.get("image_token_id", before.get("image_token_index")) == after.get(
        "image_token_id", after.get("image_token_index")
    )
