"""The table: every parameter that is built has one line, every tensor of the published 7B has one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.weights.configs import internvl
from vlm_nemo.weights.configs.languages import FORMS as LANGUAGES
from vlm_nemo.weights.configs.languages import HEAD_DIMS
from vlm_nemo.weights.configs.llava import DEFAULTS
from vlm_nemo.weights.configs.towers import FORMS as TOWERS
from vlm_nemo.weights.configs.towers import VARIANTS
from vlm_nemo.weights.shapes import our_shape
from vlm_nemo.weights.tables import naming_of
from vlm_nemo.weights.transforms import (
    BEFORE_IDENTITY,
    FUSED_QKV,
    GATE_UP,
    IDENTITY,
    KV,
    PATCH,
    PATCH_FRAMES,
    QKV,
    TRANSPOSED,
    TWICE_UNSQUEEZED,
    UNSQUEEZED,
    Sizes,
    Transform,
)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_named_once(tied: bool) -> None:
    cfg = tiny.tiny_model(tied_embeddings=tied)
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        parameters = local_parameters(build_model(cfg, ParallelConfig(), "fp32", 0))
        built = {box.key: box.global_shape for p in parameters for box in p.boxes}
        groups.stop()
    naming = naming_of(cfg)
    named = [entry.ours for entry in naming.entries(cfg)]
    assert len(named) == len(set(named)) and set(named) == set(built)
    assert {key: our_shape(key, cfg) for key in named} == built
    theirs = [(entry.part, name) for entry in naming.entries(cfg) for name in entry.theirs]
    assert len(theirs) == len(set(theirs))
    assert all(naming.understood(naming.spelled(*name)) == name for name in theirs)


def test_tensors_that_nobody_knows_are_listed() -> None:
    naming, cfg = naming_of(tiny.tiny_model()), tiny.tiny_model()
    known = [(entry.part, name) for entry in naming.entries(cfg) for name in entry.theirs]
    strange = [("projector", "image_newline"), *(("language", f"model.layers.{n}.mlp.up_proj.weight") for n in (7, 8))]
    idle = [("vision", "post_layernorm.weight"), ("vision", "encoder.layers.2.mlp.fc1.bias")]
    assert naming.leftovers([*known, *strange, *idle], cfg) == (idle, strange)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (IDENTITY, [(5, 3)]),
        (QKV, [(32, 6), (16, 6), (16, 6)]),
        (QKV, [(32,), (16,), (16,)]),
        (GATE_UP, [(7, 4), (7, 4)]),
        (KV, [(16, 6), (16, 6)]),
        (FUSED_QKV, [(48, 6)]),
        (FUSED_QKV, [(48,)]),
        (PATCH, [(6, 3, 4, 4)]),
        (PATCH_FRAMES, [(6, 3, 2, 4, 4)]),
        (UNSQUEEZED, [(1, 5, 3)]),
        (TWICE_UNSQUEEZED, [(1, 1, 3)]),
        (TRANSPOSED, [(5, 3)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transform_and_its_inverse(transform: Transform, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    sizes = Sizes(heads=4 if transform is FUSED_QKV else 8, kv_heads=4, patch=4, frames=2)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    back = transform.split(transform.join(tensors, sizes), sizes)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_a_group_of_heads_lies_together() -> None:
    q, k, v = (torch.arange(n).float() + start for n, start in ((4, 0), (2, 10), (2, 20)))
    assert QKV.join([q, k, v], Sizes(heads=4, kv_heads=2)).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_a_layer_of_one_is_two_of_which_the_second_changes_nothing() -> None:
    weight, bias = torch.randn(4, 3), torch.randn(4)
    for tensor, second in ((weight, torch.eye(4)), (bias, torch.zeros(4))):
        first, made = BEFORE_IDENTITY.split(tensor, Sizes())
        assert first is tensor and torch.equal(made, second)
        assert BEFORE_IDENTITY.join([tensor, made], Sizes()) is tensor
        with pytest.raises(ValueError, match="must be the identity"):
            BEFORE_IDENTITY.join([tensor, made + 1], Sizes())


def test_a_patch_lies_as_images_do() -> None:
    """Row, column, colour: what `Images.patches` holds and what a convolution sees are the same pixels."""
    convolution, image = torch.randn(5, 3, 4, 4), torch.randn(3, 4, 4)
    matrix = PATCH.join([convolution], Sizes(patch=4))
    assert torch.allclose(matrix @ image.permute(1, 2, 0).flatten(), (convolution * image).sum((1, 2, 3)), atol=1e-5)


def test_what_published_files_leave_out_is_what_transformers_fills_in() -> None:
    derived = {"head_dim", "ffn"}
    heads = "num_key_value_heads"
    kinds: list[tuple[dict[str, Any], Any]] = [
        (VARIANTS["llava"].defaults, transformers.LlavaConfig().vision_config),
        (VARIANTS["ovis2"].defaults, transformers.Ovis2Config().vision_config),
        (VARIANTS["idefics3"].defaults, transformers.Idefics3Config().vision_config),
        (VARIANTS["smolvlm"].defaults, transformers.SmolVLMConfig().vision_config),
        (TOWERS["clip"].defaults, transformers.CLIPVisionConfig()),
        (TOWERS["siglip"].defaults, transformers.SiglipVisionConfig()),
        (TOWERS["internvit"].defaults, transformers.InternVLVisionConfig()),
        (TOWERS["aimv2"].defaults, transformers.Aimv2VisionConfig()),
        (TOWERS["qwen2_vl"].defaults, transformers.Qwen2VLConfig().vision_config),
        (TOWERS["eva"].defaults, transformers.Blip2VisionConfig()),
        (LANGUAGES["llama"].defaults, transformers.LlamaConfig()),
        (LANGUAGES["mistral"].defaults, transformers.MistralConfig()),
        (LANGUAGES["qwen2"].defaults, transformers.Qwen2Config()),
        (LANGUAGES["qwen3"].defaults, transformers.Qwen3Config()),
        (LANGUAGES["mixtral"].defaults, transformers.MixtralConfig()),
        (LANGUAGES["qwen2_moe"].defaults, transformers.Qwen2MoeConfig()),
        (LANGUAGES["qwen3_moe"].defaults, transformers.Qwen3MoeConfig()),
        (LANGUAGES["mllama"].defaults, transformers.MllamaConfig().text_config),
        (LANGUAGES["gemma3"].defaults, transformers.Gemma3TextConfig()),
        (LANGUAGES["qwen2_vl"].defaults, transformers.Qwen2VLConfig().text_config),
        (LANGUAGES["qwen2_5_vl"].defaults, transformers.Qwen2_5_VLConfig().text_config),
        (DEFAULTS["llava"], transformers.LlavaConfig()),
        (DEFAULTS["llava_next"], transformers.LlavaNextConfig()),
        (DEFAULTS["llava_onevision"], transformers.LlavaOnevisionConfig()),
        (internvl.DEFAULTS, transformers.InternVLConfig()),
    ]
    for defaults, config in kinds:
        for name, value in defaults.items():
            if name not in derived:
                said = getattr(config, name)
                value = config.num_attention_heads if (name, value) == (heads, None) else value
                said = said[0] if name in ("image_size", "patch_size") and isinstance(said, tuple) else said
                assert said == value, (type(config).__name__, name)
    for name, config in (
        ("llama", transformers.LlamaConfig()),
        ("mistral", transformers.MistralConfig()),
        ("qwen2", transformers.Qwen2Config()),
        ("qwen3", transformers.Qwen3Config()),
        ("gemma3", transformers.Gemma3TextConfig()),
        ("qwen2_vl", transformers.Qwen2VLConfig().text_config),
        ("qwen2_5_vl", transformers.Qwen2_5_VLConfig().text_config),
    ):
        if HEAD_DIMS.get(name):
            assert config.head_dim == HEAD_DIMS[name]
