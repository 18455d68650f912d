"""transformers loads what we export: its logits, its token ids and its pixels are ours."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.weights import twins, zoo
from tests.weights.test_round_trip import convert, same, state
from vlm_nemo.data.chat import TEMPLATES, encode_conversation, encode_prompt
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import checkpoint
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.weights.config import hf_config_of
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.parity import hf_inputs
from vlm_nemo.weights.preprocessing import preprocessor_config, processor_config, read_preprocessing
from vlm_nemo.weights.words import export_tokenizer, import_tokenizer, template_of

QUESTION = "What colour is the star?"


ONE = image_spec(LayoutConfig(aspect="squash"), size=8, patch=8)
"""An image of one placeholder, as a chat template has it."""


def picture(width: int, height: int) -> Image.Image:
    """Smooth, so that two bicubic filters differ by rounding alone."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [255 * x, 255 * y, 127 + 100 * np.sin(4 * x + 3 * y)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def our_logits(step: Path, cfg: ModelConfig, sample: EncodedSample) -> torch.Tensor:
    """[T, V] of one conversation, by the model of a checkpoint."""
    tokenizer = Tokenizer(step / "tokenizer")
    row = pack_batch([sample], len(sample.tokens), tokenizer.pad_id, cfg.vision.patch_size)
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        (model,) = build_model(cfg, ParallelConfig(), "fp32", 0, fresh=())
        checkpoint.load_weights(step, [model])
        batch = model_batch(row, cfg, image_token=tokenizer.image_id, device=device.device())
        logits = model.eval()(batch, gather_logits=True)[0]
        groups.stop()
    return logits


def load(folder: Path) -> Any:
    """As the model card says; a key that is missing or left over fails."""
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "one key head a head": {"text": {"num_key_value_heads": 4}},
    "class token kept": {"vision_feature_select_strategy": "full"},
    "last layer": {"vision_feature_layer": -1, "vision": {"hidden_act": "gelu"}},
    "third layer from the end": {"vision_feature_layer": -3},
    "tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("variant", "aspect"),
    [*((name, "pad") for name in VARIANTS), ("grouped-query", "crop"), ("grouped-query", "squash")],
)
def test_logits_ids_and_pixels_are_ours(tmp_path: Path, variant: str, aspect: str) -> None:
    original = twins.llava(tmp_path / "hf", aspect=aspect, **VARIANTS[variant])
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    step = tmp_path / "ours"
    cfg = model_config(checkpoint_config(step))
    assert cfg.layout.aspect == aspect
    spec, tokenizer = spec_of(cfg), Tokenizer(step / "tokenizer")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    model = load(tmp_path / "back")
    for width, height, within in ((twins.SIZE, twins.SIZE, 0), (40, 24, 2), (20, 36, 2)):
        pictures = [picture(width, height), picture(height, width)]
        content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        files = [png(p) for p in pictures]
        asked: list[Message] = [{"role": "user", "content": "<image>\n<image>\n" + QUESTION}]
        text = encode_prompt(asked, tokenizer, TEMPLATES["vicuna"], plan_images(files, spec))
        assert inputs["input_ids"][0].tolist() == text.tokens
        images = decode_images(files, text, spec)
        sample = EncodedSample(tokens=text.tokens, labels=text.labels, images=images)
        given = hf_inputs(cfg, sample, [p.size for p in pictures], tokenizer.image_id)
        std = torch.tensor(cfg.vision.std).view(3, 1, 1) * 255
        levels = (inputs["pixel_values"] - given["pixel_values"]) * std
        assert levels.abs().max() <= within + 1e-3
        if within:
            continue
        with torch.no_grad():
            theirs = model(**given).logits[0]
            before = original(**given).logits[0]
        assert (our_logits(step, cfg, sample) - theirs).abs().max() < 1e-4
        assert torch.equal(theirs, before)


@pytest.mark.parametrize("name", ["vicuna", "plain", "short"])
@pytest.mark.parametrize("kind", ["byte level", "always", "first"])
def test_the_chat_template_says_what_training_saw(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "byte level":
        twins.write_tokenizer(tmp_path / "hf")
    else:
        twins.write_llama_tokenizer(tmp_path / "hf", kind)
    added = import_tokenizer(tmp_path / "hf", tmp_path / "ours")
    assert added == ([] if kind == "byte level" else ["<image>", "<pad>"])
    ours = Tokenizer(tmp_path / "ours")
    export_tokenizer(ours, tmp_path / "back", TEMPLATES[name], None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.bos_token_id == ours.bos_id and theirs.pad_token_id == ours.pad_id
    one = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    more: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *one,
        {"role": "assistant", "content": " It is red.\n"},
        {"role": "user", "content": "It is blue?"},
    ]
    # A "▁" before every piece marks where an answer begins; text can say that only with a space of its own
    whole = kind == "byte level" or TEMPLATES[name].assistant_lead
    for messages in (one, more[1:3], more) if whole else (one,):
        prompt = messages[-1]["role"] == "user"
        asked = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        encode = encode_prompt if prompt else encode_conversation
        plans = [plan_image(ONE, (8, 8))] * sum(m["content"].count("<image>") for m in messages)
        assert asked == encode(messages, ours, TEMPLATES[name], plans).tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}]
    assert theirs.apply_chat_template(parts, tokenize=False) == theirs.apply_chat_template(one, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_chat_template_says_what_training_saw(tmp_path: Path, family: str) -> None:
    ours, template = zoo.write_words(tmp_path / "ours", family), TEMPLATES[FAMILIES[family].template]
    export_tokenizer(ours, tmp_path / "back", template, family)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    turns: list[Any] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": "Two shapes?"},
    ]
    for messages in (turns[:1], turns[:2], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        prompt = messages[-1]["role"] == "user"
        asked = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        encode = encode_prompt if prompt else encode_conversation
        assert asked == encode(messages, ours, template, []).tokens
    mark = FAMILIES[family].image_text.strip("\n")
    for content in ([{"type": "image"}, {"type": "text", "text": QUESTION}], f"<image>\n{QUESTION}"):
        said = theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        assert said.count(mark) == 1 if mark else "<image>" not in said
        assert said.index(QUESTION) >= said.index(mark)
        assert not template.preamble or template.preamble not in said, "of conversations without images"
    assert template_of(tmp_path / "back") == FAMILIES[family].template


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_processor_is_found(tmp_path: Path, family: str) -> None:
    """By AutoProcessor; where its class has a part for videos, which needs torchvision (test_auto_processor.py), by its
    other parts."""
    name = next(name for name in zoo.MODELS if zoo.config(name).family == family)
    cfg, words = zoo.config(name), zoo.write_words(tmp_path / "words", family)
    back = tmp_path / "back"
    export_tokenizer(words, back, TEMPLATES[FAMILIES[family].template], family)
    for file, content in (
        ("config", hf_config_of(cfg, words)),
        ("preprocessor_config", preprocessor_config(cfg)),
        ("processor_config", processor_config(cfg)),
    ):
        (back / f"{file}.json").write_text(json.dumps(content))
    if family in ("llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "smolvlm"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(back)
        for role, token in FAMILIES[family].tokens.items():
            assert getattr(tokenizer, role) == token
        class_name = FAMILIES[family].image_processor + "Pil"
        image_processor = getattr(transformers, class_name).from_pretrained(back)
    else:
        processor = transformers.AutoProcessor.from_pretrained(back)
        assert type(processor).__name__ == FAMILIES[family].processor
        image_processor = processor.image_processor
        assert processor.tokenizer.get_chat_template() if family != "blip2" else True
    given = read_back(back, cfg)
    # no file says the side of a native image; it only sizes the blank one of rows without images
    assert given.layout == cfg.layout and replace(given.vision, image_size=cfg.vision.image_size) == cfg.vision
    assert list(image_processor.image_mean) == cfg.vision.mean


def read_back(folder: Path, cfg: ModelConfig) -> ModelConfig:
    """The configuration that the folder's files say."""
    found = FAMILIES[cfg.family].read(cfg.family, json.loads((folder / "config.json").read_text()), "config.json")
    read_preprocessing(folder, found)
    return found


def test_what_transformers_5_saves_again_is_the_same_model(tmp_path: Path) -> None:
    """Its own spelling of keys, config.json and processor_config.json."""
    twins.llava(tmp_path / "hf", aspect="squash")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back")
    load(tmp_path / "back").save_pretrained(tmp_path / "five")
    transformers.AutoProcessor.from_pretrained(tmp_path / "back").save_pretrained(tmp_path / "five")
    assert not (tmp_path / "five" / "preprocessor_config.json").exists()
    convert(f"hf={tmp_path}/five", f"out={tmp_path}/again")
    convert(f"checkpoint={tmp_path}/again", f"out={tmp_path}/back2")
    ours, again = (checkpoint_config(tmp_path / name) for name in ("ours", "again"))
    assert ours["model"] == again["model"] and ours["data"]["template"] == again["data"]["template"]
    same(state(tmp_path / "back"), state(tmp_path / "back2"))
    text = "A red star and a blue ring"
    assert Tokenizer(tmp_path / "ours" / "tokenizer").encode(text) == Tokenizer(
        tmp_path / "again" / "tokenizer"
    ).encode(text)


@pytest.mark.parametrize("part", ["all", "vision", "language"])
def test_the_model_card_s_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    twins.llava(tmp_path / "hf")
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    convert(f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back", f"part={part}")
    picture(30, 20).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "back" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines, {"FOLDER": str(tmp_path / "back")})
