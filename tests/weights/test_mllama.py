"""Llama 3.2 Vision's own traps: rows that the head has not, a tower whose class knows one way, keys that lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.weights import zoo
from tests.weights.published import FakeWords, published
from vlm_nemo import cli
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.twin import VOCABULARY
from vlm_nemo.train.origin import check_vocabulary
from vlm_nemo.types import UserError
from vlm_nemo.weights.config import hf_config_of
from vlm_nemo.weights.configs import mllama
from vlm_nemo.weights.words import generation_config


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "norm_eps", 1e-6),
        ("vision_config", "max_num_tiles", 5),
        ("vision_config", "supported_aspect_ratios", [[1, 1], [2, 1]]),
        ("vision_config", "vision_output_dim", 1280),
        ("vision_config", "hidden_act", "quick_gelu"),
    ],
)
def test_what_the_class_could_be_and_ours_is_not(section: str, field: str, value: Any) -> None:
    content = hf_config_of(published("llama32_vision_11b"), FakeWords())
    content[section][field] = value
    # Five tiles are well by themselves; the arrangements beside them are those of four
    name = "supported_aspect_ratios" if field == "max_num_tiles" else field
    with pytest.raises(UserError, match=rf"config.json \((vision|language)\): {name}=") as error:
        mllama.read("mllama", content, "config.json")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllama")
    zoo.save(folder, "mllama")
    return folder


def test_keys_that_lack_and_keys_nobody_knows_are_listed_at_once(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    for file in saved.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved / "model.safetensors")
    del tensors["vision_model.global_transformer.layers.1.gate_attn"]
    del tensors["language_model.model.layers.3.cross_attn.k_norm.weight"]
    tensors["vision_model.global_transformer.layers.2.gate_attn"] = tensors["multi_modal_projector.bias"][:1].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert cli.main(["convert", f"hf={tmp_path}/hf", f"out={tmp_path}/ours"]) == 2
    error = capsys.readouterr().err
    assert "lacks 2 tensors (language_model.model.layers.3.cross_attn.k_norm.weight, vision_model.global_" in error
    assert "it has 1 tensor (vision_model.global_transformer.layers.2.gate_attn)" in error
    assert error.count("\n") == 1 and not (tmp_path / "ours").exists()


def test_the_image_token_is_read_and_never_said(saved: Path) -> None:
    cfg, words = zoo.config("mllama"), Tokenizer(saved)
    tensors = load_file(saved / "model.safetensors")
    assert len(tensors["language_model.model.embed_tokens.weight"]) == VOCABULARY + 8
    assert len(tensors["language_model.lm_head.weight"]) == VOCABULARY == words.image_id
    check_vocabulary(words, cfg)
    cfg.language.input_tokens = 0
    with pytest.raises(UserError, match=f"has {VOCABULARY + 1} tokens but model.language.vocab_size is {VOCABULARY};"):
        check_vocabulary(words, cfg)


def test_a_tokenizer_beyond_those_rows_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    for file in saved.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    content = json.loads((saved / "tokenizer.json").read_text())
    one = content["added_tokens"][-1]
    content["added_tokens"] += [{**one, "id": one["id"] + n, "content": f"<more_{n}>"} for n in range(1, 9)]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
    assert cli.main(["convert", f"hf={tmp_path}/hf", f"out={tmp_path}/ours"]) == 2
    error = capsys.readouterr().err
    assert f"{VOCABULARY + 9} tokens, its embedding {VOCABULARY + 8} rows" in error and error.count("\n") == 1


def test_answers_end_at_the_turn_s_end(saved: Path) -> None:
    from vlm_nemo.data.chat import TEMPLATES

    words = Tokenizer(saved)
    ends = generation_config(words, TEMPLATES["llama32"])["eos_token_id"]
    assert ends == [words.special("<|eot_id|>"), words.eos_id]
