"""Tiny random models of every family in folders, as a person would find them: weights, tokenizer, processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.weights import twins
from tests.weights.published import hf_model, published
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.model.twin import VOCABULARY, twin
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.preprocessing import preprocessor_config, processor_config

MODELS = {
    "llava": "llava15_7b",
    "llava_linear": "llava_7b",
    "llava_next": "llava_next_vicuna_7b",
    "llava_next_mistral": "llava_next_mistral_7b",
    "llava_next_llama3": "llava_next_llama3_8b",
    "llava_onevision": "llava_onevision_0.5b",
    "internvl": "internvl3_1b",
    "internvl_6b_tower": "internvl3_38b",
    "internvl_experts": "internvl35_30b_a3b",
    "llava_mixtral": "llava15_7b",
    "llava_qwen2_moe": "llava15_7b",
    "qwen2_vl": "qwen2_vl_7b",
    "qwen2_vl_tied": "qwen2_vl_2b",
    "qwen2_5_vl": "qwen2_5_vl_7b",
    "ovis2": "ovis2_1b",
    "gemma3": "gemma3_4b",
    "gemma3_27b": "gemma3_27b",
    "idefics3": "idefics3_8b",
    "smolvlm": "smolvlm2_2.2b",
    "blip2": "blip2_vicuna_7b",
    "mllama": "llama32_vision_11b",
}
"""What tests call a model -> its file in conf/model. The first of a family is enough where a test is slow."""

DECODERS: dict[str, dict[str, Any]] = {
    "llava_mixtral": dict(num_kv_heads=8, ffn_hidden_size=14336, rope_base=1e6, moe=MoeConfig(experts=8)),
    "llava_qwen2_moe": dict(
        qkv_bias=True,
        norm_eps=1e-6,
        moe=MoeConfig(
            experts=60,
            top_k=4,
            norm_top_k=False,
            ffn_hidden_size=1408,
            shared_ffn_hidden_size=5632,
            shared_gate=True,
            every=2,
            dense_layers=[3],
        ),
    ),
}
"""Models with another decoder than their file's."""

_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_CHAT = ["<|im_start|>", "<|im_end|>"]
SPECIAL: dict[str, list[str]] = {
    "llava": [],
    "llava_next": [],
    "llava_onevision": ["<video>", *_CHAT],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>", *_CHAT],
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", *_CHAT],
    "qwen2_5_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", *_CHAT],
    "ovis2": ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", *_CHAT],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"],
    "idefics3": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *_TILES],
    "smolvlm": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *_TILES],
    "blip2": [],
    "mllama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
}
"""What a family's layout, template and processor put between the words, beside <pad> <s> </s> <image>."""
PLACEHOLDER = {
    "internvl": "<IMG_CONTEXT>",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|image_pad|>",
    "ovis2": "<IMG_ATOM>",
    "gemma3": "<image_soft_token>",
    "mllama": "<|image|>",
}
"""The image token, where it is not <image>."""


def config(name: str) -> ModelConfig:
    """A tiny model of a family."""
    cfg = published(MODELS[name])
    cfg.language = replace(cfg.language, **DECODERS.get(name, {}))
    return twin(cfg)


def write_words(folder: Path, family: str) -> Tokenizer:
    """A byte-level tokenizer with the family's special tokens."""
    rows = twins.write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = list(SPECIAL[family])
    if family == "mllama":  # its image token is the first that the head has no row for
        names += [f"<|reserved_special_token_{n}|>" for n in range(VOCABULARY - rows - len(names))]
        names.append("<|image|>")
    for number, name in enumerate(names, rows):
        content["added_tokens"].append({"id": number, "content": name, **flags})
    settings["image_token"] = PLACEHOLDER.get(family, "<image>")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def random_model(cfg: ModelConfig, words: Any) -> nn.Module:
    """transformers' class with random weights; nothing of it is zero or one."""
    torch.manual_seed(0)
    model = twins.shaken(hf_model(cfg, words=words))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # starts at zero
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if cfg.projector.num_layers == 1 and ".linear_2." in name:
                parameter.copy_(torch.eye(len(parameter)) if parameter.dim() == 2 else torch.zeros(len(parameter)))
            if parameter.numel() == 1:  # a gate: nearly shut, it would hide what it lets through
                parameter.fill_(0.8)
    model.tie_weights()
    return model.eval()


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random tiny model of `MODELS[name]`'s structure in `folder`, as transformers 5 saves it."""
    cfg = config(name)
    words = write_words(folder, cfg.family)
    model = random_model(cfg, words).to(dtype)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(cfg)))
    (folder / "processor_config.json").write_text(json.dumps(processor_config(cfg)))
    assert cfg.family in FAMILIES
    return model
