"""The table: every parameter that is built has one line, every tensor of the published 7B has one place."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests import tiny
from vlm_nemo.config import Config, build, compose
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights import llava, llava_config
from vlm_nemo.weights.transforms import GATE_UP, IDENTITY, PATCH, QKV, Sizes, Transform


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_named_once(tied: bool) -> None:
    cfg = tiny.tiny_model(tied_embeddings=tied)
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        built = {box.key for p in local_parameters(build_model(cfg, ParallelConfig(), "fp32", 0)) for box in p.boxes}
        groups.stop()
    named = [entry.ours for entry in llava.entries(cfg)]
    assert len(named) == len(set(named)) and set(named) == built
    theirs = [name for entry in llava.entries(cfg) for name in entry.hub]
    assert len(theirs) == len(set(theirs))
    assert all(llava.part_of(name) == entry.part for entry in llava.entries(cfg) for name in entry.hub)


@pytest.mark.parametrize("part", ["llava15_7b", "llava15_13b"])
def test_every_tensor_of_the_published_model_has_a_place(part: str) -> None:
    """transformers' own class at full size, on the meta device: names and shapes without the 13 GB."""
    cfg = build(compose("train", Config, [f"model={part}"]), Config).model
    lang = cfg.language
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(
                    vocab_size=lang.vocab_size,
                    hidden_size=lang.hidden_size,
                    num_hidden_layers=lang.num_layers,
                    num_attention_heads=lang.num_heads,
                    intermediate_size=lang.ffn_hidden_size,
                )
            )
        )
        theirs = {llava.hub_name(name, "llava"): tensor for name, tensor in model.state_dict().items()}
        assert len(theirs) == len(model.state_dict())
        unused = llava.unused_names([name for name in theirs if name], cfg)
        # CLIP's last layer (16 tensors), which hidden state -2 does not pass, and the norm of the pooled output
        assert len(unused) == 16 + 2
        used = {}
        for entry in llava.entries(cfg):
            parts = [theirs[name] for name in entry.hub]
            whole = entry.transform.join(parts, entry.sizes)
            used[entry.ours] = whole
            assert [t.shape for t in entry.transform.split(whole, entry.sizes)] == [t.shape for t in parts]
        assert sum(t.numel() for t in used.values()) + sum(theirs[n].numel() for n in unused) == model.num_parameters()
    placed = {name for entry in llava.entries(cfg) for name in entry.hub} | set(unused)
    assert placed == set(theirs)
    assert used["vision.patch_weight"].shape == (1024, 588)
    assert used["language.decoder.layers.5.mlp.linear_fc1.weight"].shape == (2 * lang.ffn_hidden_size, lang.hidden_size)


def test_a_tensor_that_nobody_knows_is_named() -> None:
    cfg = tiny.tiny_model()
    known = [name for entry in llava.entries(cfg) for name in entry.hub]
    with pytest.raises(UserError, match="tensor image_newline: .* no such tensor"):
        llava.unused_names([*known, "image_newline"], cfg)
    with pytest.raises(UserError, match=r"layers.7.self_attn.q_proj.weight and 1 more"):
        llava.unused_names([f"language_model.model.layers.{n}.self_attn.q_proj.weight" for n in (7, 8)], cfg)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (IDENTITY, [(5, 3)]),
        (QKV, [(32, 6), (16, 6), (16, 6)]),
        (QKV, [(32,), (16,), (16,)]),
        (GATE_UP, [(7, 4), (7, 4)]),
        (PATCH, [(6, 3, 4, 4)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transform_and_its_inverse(transform: Transform, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    sizes = Sizes(heads=8, kv_heads=4, patch=4)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    back = transform.split(transform.join(tensors, sizes), sizes)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_a_group_of_heads_lies_together() -> None:
    q, k, v = (torch.arange(n).float() + start for n, start in ((4, 0), (2, 10), (2, 20)))
    assert QKV.join([q, k, v], Sizes(heads=4, kv_heads=2)).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_what_published_files_leave_out_is_what_transformers_fills_in() -> None:
    for defaults, config in (
        (llava_config.CLIP_DEFAULTS, transformers.CLIPVisionConfig()),
        (llava_config.LLAVA_VISION_DEFAULTS, transformers.LlavaConfig().vision_config),
        (llava_config.LLAVA_DEFAULTS, transformers.LlavaConfig()),
        (llava_config.LLAMA_DEFAULTS, transformers.LlamaConfig()),
    ):
        filled = {"num_key_value_heads": 32, "head_dim": 128}  # derived from the others
        for name, value in defaults.items():
            assert getattr(config, name) == (filled[name] if value is None else value), name
