"""LLM's greedy answers against transformers' generate: 0, 1 and 2 images, alone and together, from every form."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.weights import twins
from vlm_nemo import cli
from vlm_nemo.infer.llm import LLM
from vlm_nemo.infer.sampling import SamplingParams

NEW = 8
TEXTS = ("What colour is the star?", "<image>\nWhat colour is the star?", "two: <image> and <image>, a row")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, twins.llava(folder, text={"num_hidden_layers": 3})


def picture(seed: int) -> Image.Image:
    """Of the tower's own size: resizing has tests of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (twins.SIZE, twins.SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked() -> list[dict[str, Any]]:
    return [
        {"prompt": text, "multi_modal_data": {"image": [picture(10 * i + k) for k in range(text.count("<image>"))]}}
        for i, text in enumerate(TEXTS)
    ]


@torch.no_grad()
def by_transformers(folder: Path, model: Any, prompt: dict[str, Any]) -> list[int]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    images = prompt["multi_modal_data"]["image"]
    per_image = (twins.SIZE // twins.PATCH) ** 2
    expanded = "<s>" + prompt["prompt"].replace("<image>", "<image>" * per_image)
    ids = processor.tokenizer(expanded, add_special_tokens=False, return_tensors="pt").input_ids
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values if images else None
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **({} if pixels is None else {"pixel_values": pixels}),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        # What we never choose: a placeholder without its image, and rows of the head that no token has
        suppress_tokens=[3, *range(len(processor.tokenizer), model.config.text_config.vocab_size)],
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("form", ["hf", "checkpoint", "export"])
def test_greedy_ids_equal_transformers(model: tuple[Path, Any], tmp_path: Path, form: str) -> None:
    folder, twin = model
    if not (folder / "processor_config.json").is_file():
        assert cli.main(["convert", f"hf={folder}", f"out={tmp_path}/start"]) == 0
        assert cli.main(["convert", f"checkpoint={tmp_path}/start", f"out={tmp_path}/hf"]) == 0
    start, processed = tmp_path / "start", tmp_path / "hf"
    expected = [by_transformers(processed, twin, prompt) for prompt in asked()]
    path = {"hf": folder, "checkpoint": start, "export": tmp_path / "export"}[form]
    if form == "export":
        words = [f"checkpoint={start}", f"out={path}", "precision=fp32", "capacity=64"]
        assert cli.main(["export", *words]) == 0
    llm = LLM(str(path))
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    together = [output.outputs[0].token_ids for output in llm.generate(asked(), params)]
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in asked()]
    assert together == expected and alone == expected
    assert len({tuple(ids) for ids in expected}) == len(expected), "the answers must differ to show anything"


def test_bytes_and_pictures_are_one(model: tuple[Path, Any]) -> None:
    stream = io.BytesIO()
    picture(10).save(stream, "PNG")
    llm, params = LLM(str(model[0])), SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=2)
    prompt = {"prompt": TEXTS[1], "multi_modal_data": {"image": picture(10)}}
    one = llm.generate(prompt, params)[0]
    other = llm.generate({**prompt, "multi_modal_data": {"image": stream.getvalue()}}, params)[0]
    assert one == other and one.outputs[0].logprobs is not None
