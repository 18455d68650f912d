"""Greedy answers of every family, through the cache, are transformers' own: with no, one and two images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families.pairs import png, sizes_of
from tests.weights import zoo
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.llm import LLM
from vlm_nemo.infer.prompts import text_prompt
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.weights.parity import hf_inputs

NEW = 6
ONE_EACH = [name for name in zoo.MODELS if zoo.config(name).family == name or zoo.config(name).language.moe.experts]


@torch.no_grad()
def by_transformers(
    cfg: ModelConfig, words: Tokenizer, theirs: Any, prompt: str, files: list[bytes], sizes: list[tuple[int, int]]
) -> list[int]:
    spec = spec_of(cfg)
    text = text_prompt(prompt, plan_images(files, spec), words)
    images = decode_images(files, text, spec)
    sample = EncodedSample(tokens=text.tokens, labels=text.labels, images=images, positions=text.positions)
    given = hf_inputs(cfg, sample, sizes, words.image_id)
    model = theirs
    if cfg.family == "blip2" and not files:
        model = theirs.language_model
    # What we never choose: a placeholder, and rows of the head that no token has
    never = [words.image_id, *range(words.vocab_size, cfg.language.vocab_size)]
    out = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None, suppress_tokens=never)
    return out[0, len(text.tokens) :].tolist()


@pytest.mark.parametrize("name", ONE_EACH)
def test_greedy_ids_are_transformers(tmp_path: Path, name: str) -> None:
    theirs, cfg = zoo.save(tmp_path / "hf", name), zoo.config(name)
    llm, words = LLM(str(tmp_path / "hf")), Tokenizer(tmp_path / "hf")
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    asked, expected = [], []
    for sizes in sizes_of(cfg).values():
        files = [png(*size, seed) for seed, size in enumerate(sizes)]
        prompt = "<image>" * len(files) + "What colour is the star?"
        expected.append(by_transformers(cfg, words, theirs, prompt, files, sizes))
        pictures = [Image.open(io.BytesIO(file)) for file in files]
        asked.append({"prompt": prompt, "multi_modal_data": {"image": pictures}})
    assert [output.outputs[0].token_ids for output in llm.generate(asked, params)] == expected
