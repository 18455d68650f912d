"""Decoders with experts alone, both ways: hub spelling, to the bit; what other classes have is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.weights import twins
from tests.weights.test_round_trip import convert, same, state
from vlm_nemo import cli
from vlm_nemo.model.config import LanguageConfig, MoeConfig
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.weights.configs.languages import fitting_language, read_language, write_language

SIZES: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
QWEN: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
KINDS = {
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, dict(num_local_experts=4)),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        dict(**QWEN, shared_expert_intermediate_size=16, decoder_sparse_step=2),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        dict(**QWEN, norm_topk_prob=True, head_dim=16, mlp_only_layers=[0]),
    ),
}


def save(folder: Path, name: str) -> nn.Module:
    torch.manual_seed(0)
    twins.write_tokenizer(folder)
    config, kind, own = KINDS[name]
    model = twins.shaken(kind(config(**SIZES, **own)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_decoder_with_experts_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    original = save(tmp_path / "hf", name)
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", "part=language")
    given = state(tmp_path / "hf")
    assert any(f"experts.3.{'w3' if name == 'mixtral' else 'up_proj'}.weight" in key for key in given)
    same(given, state(tmp_path / "back"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(model) is type(original)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model.eval()(ids).logits, original(ids).logits)
    cfg = model_config(checkpoint_config(tmp_path / "ours")).language
    assert fitting_language(cfg, list(KINDS))[0] == name
    assert cfg.moe.norm_top_k == (name != "qwen2_moe")


def test_a_file_without_its_class_s_defaults(tmp_path: Path) -> None:
    """Published files may leave out what equals their class's default."""
    for name, (config, _, _) in KINDS.items():
        whole = config().to_dict()
        assert read_language(name, {"model_type": name}, "x") == read_language(name, whole, "x"), name


def test_what_a_class_cannot_say_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "hf", "mixtral")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.1}))
    assert cli.main(["convert", f"hf={tmp_path}/hf", f"out={tmp_path}/ours"]) == 2
    assert "router_jitter_noise=0.1" in capsys.readouterr().err
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    assert cli.main(["convert", f"hf={tmp_path}/hf", f"out={tmp_path}/ours"]) == 2
    assert "block_sparse_moe.experts.4.w1.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moe", "kind", "key"),
    [
        (MoeConfig(experts=4, every=2), "mixtral", "moe.every"),
        (MoeConfig(experts=4, ffn_hidden_size=24), "mixtral", "moe.ffn_hidden_size"),
        (MoeConfig(experts=4, ffn_hidden_size=24, shared_ffn_hidden_size=8), "qwen2_moe", "moe.shared_gate"),
        (MoeConfig(experts=4), "llama", "moe.experts"),
    ],
)
def test_a_composition_that_no_class_has(moe: MoeConfig, kind: str, key: str) -> None:
    cfg = LanguageConfig(moe=moe, qkv_bias=kind == "qwen2_moe")
    assert key in [name for name, _, _ in fitting_language(cfg, [kind])[1]]


def test_config_json_says_what_a_token_goes_to() -> None:
    moe = MoeConfig(experts=8, top_k=3, ffn_hidden_size=24, norm_top_k=False, dense_layers=[1])
    written = write_language("qwen3_moe", LanguageConfig(moe=moe, qk_norm=True))
    assert (written["num_experts"], written["num_experts_per_tok"], written["norm_topk_prob"]) == (8, 3, False)
    assert (written["moe_intermediate_size"], written["mlp_only_layers"]) == (24, [1])
