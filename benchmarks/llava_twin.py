"""A small LLaVA-1.5 of transformers with random weights, and the same weights as a checkpoint of ours.

LLaVA's shape in small: CLIP's tower at 336 pixels, so 576 tokens an image, a two-layer projector, Llama; the tower's
last hidden state, so that neither side computes a layer that is not used.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_nemo.data.tokenizer import Tokenizer

SIDE, PATCH = 336, 14
PLACEHOLDERS = (SIDE // PATCH) ** 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Sizes(NamedTuple):
    """Of the twin."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    ffn: int = 704
    vision_width: int = 128
    vision_layers: int = 4
    vision_ffn: int = 512


TINY = Sizes(width=32, layers=2, ffn=64, vision_width=32, vision_layers=2, vision_ffn=64)
"""For --quick."""


def processor(words: Path) -> Any:
    """transformers' LlavaProcessor: short side to 336 pixels, the middle cut out, fast tokenizer, pads to the right."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.padding_side = "right"
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_mean=MEAN, image_std=STD)
    # The class token, which the strategy then leaves out
    kept = dict(num_additional_image_tokens=1, vision_feature_select_strategy="default")
    return LlavaProcessor(images, tokenizer, patch_size=PATCH, **kept)


def write_twin(folder: Path, words: Path, sizes: Sizes) -> None:
    """folder/hf: transformers' folder; folder/checkpoint: what `vlm-nemo convert` makes of it. words: tokenizer."""
    import transformers

    from vlm_nemo.weights.from_hf import to_checkpoint

    tokenizer = Tokenizer(words)
    vision = transformers.CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.vision_ffn,
    )
    text = transformers.LlamaConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.ffn,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_id,
        rms_norm_eps=1e-5,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    hf = folder / "hf"
    with contextlib.redirect_stderr(io.StringIO()):
        transformers.LlavaForConditionalGeneration(config).save_pretrained(hf)
    for path in words.iterdir():
        shutil.copy(path, hf)
    made = processor(words)
    settings = made.image_processor.to_dict() | {"image_processor_type": "CLIPImageProcessor"}
    (hf / "preprocessor_config.json").write_text(json.dumps(settings))
    to_checkpoint(
        [str(hf)],
        folder / "checkpoint",
        dtype=None,
        max_bytes=10**9,
        feature_layer=None,
        template="vicuna",
        say=lambda line: None,
    )
