"""Small random models of transformers, saved as a person would find them: in its spelling and in the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.model.config import ModelConfig, VisionConfig
from vlm_nemo.weights.preprocessing import preprocessor_config

TEXTS = ["What colour is the star? It is red.", "A red star and a blue ring: two shapes, one row."] * 4
SIZE, PATCH = 16, 8


def clip_config(**changes: Any) -> transformers.CLIPVisionConfig:
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    return transformers.CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, **{**sizes, **changes})


def llama_config(vocab: int, **changes: Any) -> transformers.LlamaConfig:
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.LlamaConfig(vocab_size=vocab, rope_theta=5000.0, **{**ids, **sizes, **changes})


def shaken(model: nn.Module) -> nn.Module:
    """Norms and biases start at one and zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
    return model.eval()


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with all that we need; <pad> <s> </s> <image> are 0 to 3."""
    return train_tokenizer(TEXTS, 300, folder)


def write_llama_tokenizer(folder: Path, prepend: str = "always") -> int:
    """A tokenizer like Llama 2's: "▁" before words, <s> put first, neither <pad> nor <image>.

    prepend: before which pieces of text there is a "▁" even without a space, always | first.
    """
    words = sorted({piece for text in TEXTS for word in text.split() for piece in ("▁" + word, *word)})
    letters = [chr(c) for c in range(32, 127)] + ["▁", "\n"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=prepend), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def llava(
    folder: Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    aspect: str = "pad",
    **changes: Any,
) -> transformers.LlavaForConditionalGeneration:
    """A random LLaVA-1.5 in `folder`, as transformers 5 saves it."""
    torch.manual_seed(0)
    write_tokenizer(folder)
    clip, llama = clip_config(**(vision or {})), llama_config(320, **(text or {}))
    config = transformers.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=3, **changes)
    model = shaken(transformers.LlavaForConditionalGeneration(config).to(dtype))
    model.tie_weights()
    model.save_pretrained(folder)
    write_preprocessor(folder, aspect)
    return model


def write_preprocessor(folder: Path, aspect: str) -> None:
    cfg = ModelConfig(vision=VisionConfig(image_size=SIZE, patch_size=PATCH), layout=LayoutConfig(aspect=aspect))
    content = preprocessor_config(cfg)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def respell(folder: Path, to: Path, *, shards: int = 2) -> None:
    """The same model as the hub has it: keys and config.json of transformers 4, several files and an index."""
    to.mkdir(parents=True)
    state = load_file(folder / "model.safetensors")
    state = {
        k.replace("vision_tower.", "vision_tower.vision_model.") if k.startswith("vision_tower.") else k: v
        for k, v in state.items()
    }
    patches = (SIZE // PATCH) ** 2 + 1
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(patches)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    names = sorted(state)
    where = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        save_file({k: state[k].clone() for k in names[n::shards]}, to / file, {"format": "pt"})
        where |= {k: file for k in names[n::shards]}
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    (to / "config.json").write_text(json.dumps(config))
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "preprocessor")):
            (to / path.name).write_bytes(path.read_bytes())
