"""A vision tower or a language model alone, both ways; a model that was trained here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.weights import twins
from tests.weights.test_round_trip import convert, same, state
from vlm_nemo import cli
from vlm_nemo.config import Config, build, compose
from vlm_nemo.data.config import TEMPLATES
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.verbs.convert import how_to_train, nearest_model
from vlm_nemo.weights.from_hf import MARKS


def save_clip(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    vision = twins.clip_config()
    if kind == "CLIPVisionModel":
        model = transformers.CLIPVisionModel(vision)
    else:
        text = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        config = transformers.CLIPConfig(
            text_config=dict(**text, bos_token_id=1, eos_token_id=2), vision_config=vision.to_dict()
        )
        model = transformers.CLIPModel(config)
    twins.shaken(model).save_pretrained(folder)
    twins.write_preprocessor(folder, "crop")


def save_llama(folder: Path) -> int:
    torch.manual_seed(0)
    tokens = twins.write_llama_tokenizer(folder)
    twins.shaken(transformers.LlamaForCausalLM(twins.llama_config(tokens))).save_pretrained(folder)
    return tokens


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_a_vision_tower_alone(tmp_path: Path, kind: str) -> None:
    save_clip(tmp_path / "clip", kind)
    convert(f"hf={tmp_path}/clip", f"out={tmp_path}/ours")
    saved = checkpoint_config(tmp_path / "ours")["model"]
    assert saved["layout"]["aspect"] == "crop"
    assert (saved["vision"]["feature_layer"], saved["vision"]["num_layers"]) == (-2, 3)
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", "part=vision")
    given = {k: v for k, v in state(tmp_path / "clip").items() if not k.startswith(("text_", "logit", "visual_"))}
    same(
        {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in given.items()},
        state(tmp_path / "back"),
    )
    pixels = torch.randn(2, 3, twins.SIZE, twins.SIZE)
    tower = transformers.CLIPVisionModel.from_pretrained
    if kind == "CLIPVisionModel":
        before, after = (tower(tmp_path / f)(pixels).pooler_output for f in ("clip", "back"))
        assert torch.equal(before, after)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "back").do_center_crop


def test_a_language_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = save_llama(tmp_path / "llama")
    convert(f"hf={tmp_path}/llama", f"out={tmp_path}/ours")
    grown = (tokens + 2 + 63) // 64 * 64
    says = f"added <image> and <pad> to the tokenizer; embedding and head grow from {tokens} to {grown} rows"
    assert says in capsys.readouterr().out
    assert Tokenizer(tmp_path / "ours" / "tokenizer").image_id == tokens
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", "part=language")
    given, back = state(tmp_path / "llama"), state(tmp_path / "back")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = back.pop(name)
        assert torch.equal(table[:tokens], given[name]) and table.shape[0] == grown
        assert torch.equal(table[tokens:], given[name].mean(0).expand(grown - tokens, -1))
        given.pop(name)
    same(given, back)
    load = transformers.LlamaForCausalLM.from_pretrained
    ids = torch.arange(3, 20)[None]
    before, after = (load(tmp_path / f)(ids).logits[..., :tokens] for f in ("llama", "back"))
    assert torch.equal(before, after)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs("<image>", add_special_tokens=False).input_ids == [tokens]
    assert (theirs.pad_token_id, theirs.bos_token_id, len(theirs)) == (tokens + 1, 1, tokens + 2)


def test_both_together_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path / "clip", "CLIPModel")
    save_llama(tmp_path / "llama")
    convert(f"hf=[{tmp_path}/clip,{tmp_path}/llama]", f"out={tmp_path}/ours")
    assert "it has no projector: train with checkpoint.reset=[projector]" in capsys.readouterr().out
    assert tensors.Reader(tmp_path / "ours" / "weights").parts() == {"vision", "language"}
    assert cli.main(["convert", f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back"]) == 2
    assert "has no projector; it can give part=vision and part=language" in capsys.readouterr().err
    words = [f"checkpoint={tmp_path}/ours", "prompt=Hello"]
    assert cli.main(["generate", *words]) == 2
    assert "has no projector: train it from a fresh start with checkpoint.reset=[projector]" in capsys.readouterr().err
    words = [f"hf=[{tmp_path}/llama,{tmp_path}/llama]", f"out={tmp_path}/twice"]
    assert cli.main(["convert", *words]) == 2
    assert "both give the language; name one of them" in capsys.readouterr().err


def test_how_to_train_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file of one's own where it is none of ours, else by name and by what differs."""
    save_clip(tmp_path / "clip", "CLIPModel")
    save_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    convert("hf=[clip,llama]", "out=ours")
    words = "data.tokenizer=ours/tokenizer data.template=vicuna checkpoint=ours checkpoint.reset=[projector]"
    line = "its model is none of ours: copy ours/model.yaml to conf/model/NAME.yaml of your folder and train it with"
    assert f"{line} model=NAME {words}\n" in capsys.readouterr().out
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "ours" / "model.yaml").rename(tmp_path / "conf" / "model" / "mine.yaml")
    composed = build(compose("train", Config, ["model=mine"]), Config).model
    assert composed == model_config(checkpoint_config(tmp_path / "ours"))
    model = build(compose("train", Config, ["model=qwen2_5_vl_7b"]), Config).model
    assert nearest_model(asdict(model)) == ("qwen2_5_vl_7b", {})
    model.language.vocab_size, model.vision.full_attention_layers, model.init_std = 77, [1, 2], 0.5
    differing = {"vision.full_attention_layers": [1, 2], "language.vocab_size": 77}
    assert nearest_model(asdict(model)) == ("qwen2_5_vl_7b", differing)
    saved = {"model": asdict(model), "data": {"template": "qwen"}}
    monkeypatch.setattr("vlm_nemo.verbs.convert.checkpoint_config", lambda folder: saved)
    said = (
        "train it with model=qwen2_5_vl_7b model.vision.full_attention_layers=[1,2] model.language.vocab_size=77 data"
    )
    assert str(how_to_train(tmp_path / "ours")).startswith(said)


def test_the_template_of_a_decoder_alone_is_that_of_its_special_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(MARKS) < set(TEMPLATES)
    save_llama(tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer.json"
    content = json.loads(path.read_text())
    for token, name in zip(content["added_tokens"][1:], ("<|im_start|>", "<|im_end|>"), strict=True):
        vocab = content["model"]["vocab"]
        vocab[name] = vocab.pop(token["content"])
        token["content"] = name
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(names))
    convert(f"hf={tmp_path}/llama", f"out={tmp_path}/ours")
    assert "template chatml" in capsys.readouterr().out
    assert checkpoint_config(tmp_path / "ours")["data"]["template"] == "chatml"


def test_a_tower_that_was_trained_here_is_written_with_the_layers_it_has(tmp_path: Path) -> None:
    original = twins.llava(tmp_path / "hf")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    (tmp_path / "ours" / "weights" / "unused.safetensors").unlink()
    (tmp_path / "ours" / "manifest.json").unlink()
    checkpoint.write_manifest(tmp_path / "ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]) == (2, -1)
    assert "`post_layernorm` is a stand-in" in (tmp_path / "back" / "README.md").read_text()
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    given = dict(input_ids=torch.tensor([[1, 3, 3, 3, 3, 9]]), pixel_values=torch.randn(1, 3, twins.SIZE, twins.SIZE))
    assert torch.equal(model(**given).logits, original(**given).logits)


def test_another_type_of_numbers(tmp_path: Path) -> None:
    twins.llava(tmp_path / "hf")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours", "dtype=bfloat16")
    assert checkpoint_config(tmp_path / "ours")["precision"] == "bf16"
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", "dtype=float16")
    assert {t.dtype for t in load_file(tmp_path / "back" / "model.safetensors").values()} == {torch.float16}
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    assert torch.equal(state(tmp_path / "back")[name], state(tmp_path / "hf")[name].bfloat16().half())


def test_our_template_is_known_again(tmp_path: Path) -> None:
    twins.llava(tmp_path / "hf")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours", "template=short")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    convert(f"hf={tmp_path}/back", f"out={tmp_path}/again")
    assert checkpoint_config(tmp_path / "again")["data"]["template"] == "short"
    ours, again = (checkpoint_config(tmp_path / name)["model"] for name in ("ours", "again"))
    assert ours == again
    card = (tmp_path / "back" / "README.md").read_text()
    assert "Template `short`" in card and str(tmp_path / "ours") in card
