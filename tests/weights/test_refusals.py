"""What convert does not do it says in one line: the field and its value, the file, the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights import twins
from vlm_nemo import cli
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime import device, groups
from vlm_nemo.types import UserError
from vlm_nemo.weights.config import check_exportable, model_config_of
from vlm_nemo.weights.hf import load_hf_weights
from vlm_nemo.weights.hf_folder import HFFolder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in both spellings, and a checkpoint made of it."""
    folder = tmp_path_factory.mktemp("good")
    twins.llava(folder / "five")
    twins.respell(folder / "five", folder / "hub")
    assert cli.main(["convert", f"hf={folder}/hub", f"out={folder}/ours"]) == 0
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.main(["convert", *(str(word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


TOP, TEXT, VISION = "", "text_config", "vision_config"


@pytest.mark.parametrize(
    ("section", "field", "value", "says"),
    [
        (TEXT, "rope_scaling", {"type": "yarn", "factor": 2.0}, "(language): rope_scaling.rope_type='yarn' is not s"),
        (TEXT, "rope_parameters", {"rope_type": "longrope"}, "rope_parameters.rope_type='longrope'"),
        (TEXT, "attention_bias", True, "(language): attention_bias=True is not something this version does; it does F"),
        (TEXT, "mlp_bias", True, "mlp_bias=True"),
        (
            TEXT,
            "hidden_act",
            "gelu",
            "(language): hidden_act='gelu' is not something this version does; it does 'silu",
        ),
        (
            TEXT,
            "head_dim",
            16,
            "other shapes than its config.json says: language_model.model.layers.0.self_attn.k_p",
        ),
        (
            TEXT,
            "model_type",
            "gpt2",
            "(language): model_type='gpt2' is not something this version does; it does 'l",
        ),
        (TEXT, "tie_word_embeddings", True, "tie_word_embeddings=True, but its lm_head differs from its embedding"),
        (TEXT, "vocab_size", 384, "language_model.model.embed_tokens.weight [320, 32] instead of [384, 32]"),
        (
            TEXT,
            "num_hidden_layers",
            3,
            "it lacks 9 tensors (language_model.model.layers.2.input_layernorm.weight, ",
        ),
        (
            TEXT,
            "num_hidden_layers",
            1,
            "it has 9 tensors (language_model.model.layers.1.input_layernorm.weight, la",
        ),
        (
            VISION,
            "hidden_act",
            "relu",
            "(vision): hidden_act='relu' is not something this version does; it does 'qui",
        ),
        (VISION, "model_type", "pixtral", "(vision): model_type='pixtral'"),
        (VISION, "num_channels", 4, "num_channels=4"),
        (VISION, "image_size", [16, 32], "image_size=[16, 32]"),
        (TOP, "vision_feature_layer", [-2, -3], "vision_feature_layer=[-2, -3] is not something this version does"),
        (TOP, "vision_feature_layer", -9, "feature_layer is -9, but the tower has 3 layers"),
        (TOP, "vision_feature_select_strategy", "cls", "vision_feature_select_strategy='cls'"),
        (TOP, "projector_hidden_act", "relu", "projector_hidden_act='relu'"),
        (TOP, "quantization_config", {"bits": 4}, "quantization_config={'bits': 4}"),
        (TOP, "multimodal_projector_bias", False, "it has 2 tensors (multi_modal_projector.linear_1.bias, multi_moda"),
        (TOP, "projector_hidden_act", "linear", "two linear layers without an activation between; the second must be"),
        (TOP, "image_token_index", 7, "the image token is 7, but tokenizer.json has no added token of that id"),
        (
            TOP,
            "architectures",
            ["Idefics2ForConditionalGeneration"],
            "holds a Idefics2ForConditionalGeneration; ",
        ),
        (
            TOP,
            "architectures",
            ["LlamaForCausalLM"],
            "82 tensors (language_model.lm_head.weight, language_model.model.embed",
        ),
    ],
)
def test_a_configuration_that_is_another_model(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str, field: str, value: Any, says: str
) -> None:
    shutil.copytree(good / "hub", tmp_path / "hub")
    edited(tmp_path / "hub", "config.json", lambda c: (c[section] if section else c).update({field: value}))
    assert says in error_of(capsys, f"hf={tmp_path}/hub", f"out={tmp_path}/ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]  # nothing half written


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("do_normalize", False, "do_normalize=False is not something this version does; it does true"),
        ("resample", 0, "resample=0 is not something this version does; it does 1 (lanczos), 2 (bilinear), 3 (bicu"),
        ("rescale_factor", 1.0, "rescale_factor=1.0"),
        ("size", {"shortest_edge": 32}, "the vision tower takes squares of 16 pixels"),
    ],
)
def test_pixels_that_would_be_others(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, says: str
) -> None:
    shutil.copytree(good / "hub", tmp_path / "hub")
    edited(tmp_path / "hub", "preprocessor_config.json", lambda c: c.update({field: value}))
    assert says in error_of(capsys, f"hf={tmp_path}/hub", f"out={tmp_path}/ours")


def damage(folder: Path, fault: str) -> None:
    shard, index = folder / "model-00002-of-00002.safetensors", folder / "model.safetensors.index.json"
    if fault == "shard missing":
        shard.unlink()
    elif fault == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif fault == "shard garbled":
        shard.write_bytes(b"garbage" * 10)
    elif fault == "index missing":
        index.unlink()
    elif fault == "index broken":
        index.write_text("{")
    elif fault == "index empty":
        index.write_text("{}")
    elif fault == "index leads elsewhere":
        edited(folder, index.name, lambda c: c["weight_map"].update(a="../x.safetensors"))
    elif fault == "tensor missing":
        tensors = load_file(shard)
        tensors.pop(min(tensors))
        save_file(tensors, shard)
    elif fault == "pickle":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        raise AssertionError(fault)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shard missing", "model-00002-of-00002.safetensors is missing; the index names it"),
        ("shard cut", "model-00002-of-00002.safetensors is damaged ("),
        ("shard garbled", "model-00002-of-00002.safetensors is damaged ("),
        ("index missing", "has neither model.safetensors nor model.safetensors.index.json"),
        ("index broken", "model.safetensors.index.json is not JSON"),
        ("index empty", "model.safetensors.index.json has no weight_map"),
        ("index leads elsewhere", "names '../x.safetensors', which is not a file of its folder"),
        ("tensor missing", "model-00002-of-00002.safetensors has no tensor "),
        ("pickle", "holds pickled weights (pytorch_model.bin), which can run code and are not opened"),
        ("no config", "config.json cannot be read: No such file or directory"),
        ("no tokenizer", "has no tokenizer.json; save the language model's fast tokenizer there"),
    ],
)
def test_a_damaged_folder(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, says: str
) -> None:
    shutil.copytree(good / "hub", tmp_path / "hub")
    damage(tmp_path / "hub", fault)
    assert says in error_of(capsys, f"hf={tmp_path}/hub", f"out={tmp_path}/ours")


def test_a_damaged_checkpoint(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "ours", tmp_path / "ours")
    file = tmp_path / "ours" / "weights" / "unused.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    error = error_of(capsys, f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    assert "is damaged: weights/unused.safetensors" in error


@pytest.mark.parametrize(
    ("part", "field", "value", "says"),
    [
        ("vision", "class_token", False, r"no such model: model.vision.class_token=false \(it has true\)"),
        ("vision", "pre_norm", False, "model.vision.pre_norm=false"),
        ("projector", "kind", "perceiver", r"model.projector.kind=perceiver \(it has mlp\)"),
        ("reduce", "kind", "merge", r"model.reduce.kind=merge \(it has none\)"),
        ("language", "norm_plus_one", True, "model.language.norm_plus_one=true"),
        ("megatron", "qk_layernorm", True, r"model.megatron.qk_layernorm=true \(it has no such field\)"),
    ],
)
def test_a_model_that_has_no_class_there(part: str, field: str, value: Any, says: str) -> None:
    cfg = ModelConfig()
    if part == "megatron":
        cfg.megatron = {"recompute_granularity": "full", field: value}
    else:
        setattr(getattr(cfg, part), field, value)
    with pytest.raises(UserError, match=says):
        check_exportable(cfg, ("vision", "projector", "language"))


def test_words_that_do_not_fit(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path}/x"
    assert "name the model, as one of checkpoint=DIR, hf=DIR" in error_of(capsys, out)
    assert "name the model, as one of checkpoint=DIR, hf=DIR" in error_of(
        capsys, out, f"hf={good}/hub", f"checkpoint={good}/ours"
    )
    assert "part=vision is for checkpoint=DIR" in error_of(capsys, out, f"hf={good}/hub", "part=vision")
    said = error_of(capsys, out, f"hf={good}/hub", "template=shrot")
    assert "template must be one of auto, vicuna, " in said and "not 'shrot'; did you mean short?" in said
    assert "max_shard_gb=0.0 must be above 0" in error_of(capsys, out, f"hf={good}/hub", "max_shard_gb=0")
    assert "exists already; name a new folder" in error_of(capsys, f"out={good}/ours", f"hf={good}/hub")
    assert "no checkpoint at" in error_of(capsys, out, f"checkpoint={tmp_path}")
    assert "out is not set" in error_of(capsys, f"hf={good}/hub")


def test_one_process(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = error_of(capsys, f"hf={good}/hub", f"out={tmp_path}/ours")
    assert error == "error: convert runs in one process, not 2; start it by itself\n"


def test_a_folder_that_is_not_the_model(good: Path) -> None:
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime.config import ParallelConfig

    folder = HFFolder(good / "hub")
    cfg = model_config_of(folder)
    wider, deeper = model_config_of(folder), model_config_of(folder)
    wider.language.ffn_hidden_size = 96
    deeper.vision.feature_layer = -1
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        load_hf_weights(folder, build_model(cfg, ParallelConfig(), "fp32", 0))
        with pytest.raises(UserError, match=r"mlp.linear_fc1.weight is \[96, 32\] in .* but \[192, 32\] in the model"):
            load_hf_weights(folder, build_model(wider, ParallelConfig(), "fp32", 0))
        with pytest.raises(UserError, match=r"has no weights of the model's vision.blocks.layers.2"):
            load_hf_weights(folder, build_model(deeper, ParallelConfig(), "fp32", 0))
        groups.stop()
