"""AutoProcessor, as a user of a folder of ours calls it where torchvision is installed: ids and pixels are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.weights import zoo
from tests.weights.auto_processor import QUESTION
from tests.weights.test_transformers_loads_it import picture
from vlm_nemo.data.chat import TEMPLATES, encode_prompt
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.weights.config import hf_config_of
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.parity import hf_inputs
from vlm_nemo.weights.preprocessing import preprocessor_config, processor_config
from vlm_nemo.weights.words import export_tokenizer

EXTRAS = Path(sys.prefix) / "processors"
"""Where launch/setup.sh puts torchvision and num2words: its operators do not load with torch's CPU build."""
ASKED = [family for family in FAMILIES if family != "blip2"]
"""Families with a chat template."""
SIZES = [(90, 60), (50, 120)]


def write(folder: Path, family: str) -> tuple[ModelConfig, Tokenizer]:
    """A folder as `convert` writes it, without weights."""
    cfg = zoo.config(next(name for name in zoo.MODELS if zoo.config(name).family == family))
    words = zoo.write_words(folder / "words", family)
    export_tokenizer(words, folder, TEMPLATES[FAMILIES[family].template], family)
    files = {
        "config": hf_config_of(cfg, words),
        "preprocessor_config": preprocessor_config(cfg),
        "processor_config": processor_config(cfg),
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return cfg, words


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Path]]:
    """One process for all families: (their folders' parent, what it said, the pictures)."""
    assert (EXTRAS / "torchvision").is_dir(), "make setup puts torchvision there"
    root = tmp_path_factory.mktemp("auto")
    pictures = [root / f"{n}.png" for n in range(len(SIZES))]
    for path, size in zip(pictures, SIZES, strict=True):
        picture(*size).save(path)
    for family in ASKED:
        write(root / family, family)
    command = [sys.executable, "-m", "tests.weights.auto_processor", str(EXTRAS)]
    command += [*(str(root / family) for family in ASKED), "--", *(str(path) for path in pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1]), pictures


@pytest.mark.parametrize("family", ASKED)
def test_auto_processor_gives_our_ids_and_pixels(asked: Any, tmp_path: Path, family: str) -> None:
    root, said, pictures = asked
    found = said[str(root / family)]
    assert found["processor"] == FAMILIES[family].processor
    if family != "llava":  # LLaVA's has two: CLIP's crops, its own pads
        assert found["image_processor"] == FAMILIES[family].image_processor
    cfg, words = write(tmp_path, family)
    spec = spec_of(cfg)
    files = [path.read_bytes() for path in pictures]
    mark = "<image>\n" if FAMILIES[family].image_text.endswith("\n") else "<image>"
    turns: list[Message] = [{"role": "user", "content": mark * len(files) + QUESTION}]
    text = encode_prompt(turns, words, TEMPLATES[FAMILIES[family].template], plan_images(files, spec))
    theirs = load_file(root / family / "asked.safetensors")
    assert theirs["input_ids"][0].tolist() == text.tokens
    sample = EncodedSample(
        tokens=text.tokens, labels=text.labels, images=decode_images(files, text, spec), positions=text.positions
    )
    ours = hf_inputs(cfg, sample, SIZES, words.image_id)
    assert ours.keys() <= theirs.keys() | {"token_type_ids", "mm_token_type_ids", "batch_num_images"}
    levels = 255 * min(cfg.vision.std)
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    apart = (ours["pixel_values"] - theirs["pixel_values"]).abs().max() * levels
    assert apart <= 2 + 1e-3
    for name in ours.keys() & theirs.keys() - {"pixel_values"}:
        assert torch.equal(ours[name].long(), theirs[name].long()), name
