"""Every model of conf/model is one that transformers' class has: each of its tensors has a place, in its shape."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from tests.weights.published import NAMES, FakeWords, hf_config, hf_model, hf_tensors, published
from vlm_nemo.check.world import pretend
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.twin import twin
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.weights.config import hf_config_of, whole_complaints
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.shapes import expected_shapes, our_shape
from vlm_nemo.weights.tables import naming_of

MILLIONS = {
    "llava_7b": 7060,
    "llava15_7b": 7063,
    "llava15_13b": 13351,
    "llava_next_vicuna_7b": 7063,
    "llava_next_mistral_7b": 7567,
    "llava_next_llama3_8b": 8356,
    "llava_onevision_0.5b": 894,
    "llava_onevision_7b": 8030,
    "internvl25_1b": 938,
    "internvl25_4b": 3713,
    "internvl3_1b": 938,
    "internvl3_2b": 2089,
    "internvl3_8b": 7944,
    "internvl3_38b": 38388,
    "internvl35_30b_a3b": 30849,
    "qwen2_vl_2b": 2209,
    "qwen2_vl_7b": 8291,
    "qwen2_5_vl_3b": 3755,
    "qwen2_5_vl_7b": 8292,
    "ovis2_1b": 1131,
    "ovis2_8b": 8900,
    "gemma3_4b": 4300,
    "gemma3_12b": 12187,
    "gemma3_27b": 27432,
    "idefics3_8b": 8462,
    "smolvlm_256m": 256,
    "smolvlm_500m": 507,
    "smolvlm2_2.2b": 2246,
    "blip2_vicuna_7b": 7900,
    "llama32_vision_11b": 10670,
    "llama32_vision_90b": 88593,
}
"""Parameters of the published models (millions; of blip2_vicuna_7b, which nobody published, the parts')."""


def check_names_and_shapes(cfg: ModelConfig, theirs: dict[str, Any]) -> None:
    """All of transformers' tensors have a place in the table, the table has no other, and the shapes are the same."""
    naming = naming_of(cfg)
    named = {naming.understood(key): tensor for key, tensor in theirs.items()}
    assert None not in named and len(named) == len(theirs)
    known, strange = naming.leftovers([name for name in named if name], cfg)
    assert strange == []
    used = set()
    for entry in naming.entries(cfg):
        shapes = [tuple(named[entry.part, name].shape) for name in entry.theirs]
        assert shapes == expected_shapes(entry, cfg), entry.ours
        used |= {(entry.part, name) for name in entry.theirs}
    assert used | set(known) == set(named)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_published_model_has_a_place(name: str) -> None:
    cfg = published(name)
    assert whole_complaints(cfg) == []
    model = hf_model(cfg, "meta")
    check_names_and_shapes(cfg, hf_tensors(model))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.02), millions


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_is_the_same_model_but_small(name: str) -> None:
    cfg = published(name)
    small = twin(cfg)
    assert whole_complaints(small) == []
    model = hf_model(small)
    check_names_and_shapes(small, hf_tensors(model))
    assert sum(p.numel() for p in model.parameters()) < 300_000
    # A twin runs by torch's own operations, wherever it is
    differing = set(_switches(asdict(replace(cfg, kernels=small.kernels, fp8=small.fp8)))) ^ set(
        _switches(asdict(small))
    )
    assert not differing


def _switches(values: Any, where: str = "") -> list[tuple[str, Any]]:
    """What is not a size: texts, truths, and whether something is there at all."""
    if isinstance(values, dict):
        return [pair for key, value in values.items() for pair in _switches(value, f"{where}.{key}")]
    if isinstance(values, str | bool):
        return [(where, values)]
    return [(where, values is None or values == [])]


@pytest.mark.parametrize("name", NAMES)
def test_config_json_and_back(name: str) -> None:
    """What is written is read again, also as transformers 5 writes it."""
    cfg = published(name)
    written = hf_config_of(cfg, FakeWords())
    family = FAMILIES[cfg.family]
    for content in (written, hf_config(written).to_dict()):
        again = family.read(cfg.family, content, "config.json")
        again.layout, again.init_std = cfg.layout, cfg.init_std
        again.vision.mean, again.vision.std = cfg.vision.mean, cfg.vision.std
        assert asdict(again) == asdict(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_our_model_of_that_size_is_built_and_has_these_shapes(name: str) -> None:
    """The modules themselves, on shapes without memory: no check refuses a size that is published."""
    cfg = published(name)
    if cfg.language.moe.experts is not None:  # thousands of modules, and all layers are alike
        cfg.language.num_layers = 2
    naming = naming_of(cfg)
    expected = {entry.ours: our_shape(entry.ours, cfg) for entry in naming.entries(cfg)}
    groups.stop()  # of an earlier test
    with pretend(ParallelConfig(), world=1, rank=0):
        named = VLM(cfg, ParallelConfig(), torch.bfloat16).named_parameters()
        built = {name.replace(".local_experts.", "."): tuple(p.shape) for name, p in named}
    assert built == expected
    spec = spec_of(cfg)
    plan = plan_image(spec, (1024, 768))
    grids = plan.grids if spec.tiles is None else [spec.grid] * spec.tiles
    assert plan.embeddings == sum(view_tokens(spec, grid) for grid in grids)
