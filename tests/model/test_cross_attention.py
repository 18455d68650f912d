"""Decoder layers that look at images, against transformers' Mllama: packed, and through the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM, _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from tests import tiny
from tests.model.looking import SAMPLES, Sample, looking_model, pictures, row
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.torch_backend import TorchBackend
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.build import build_model
from vlm_nemo.model.looks import make_looks
from vlm_nemo.model.vlm import VLM, check_looks
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import check_layout
from vlm_nemo.types import UserError
from vlm_nemo.weights.transforms import GATE_UP, IDENTITY, KV, QKV, Sizes

CFG = looking_model()


@pytest.fixture
def chunk() -> Iterator[VLM]:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        (built,) = build_model(CFG, ParallelConfig(), "fp32", seed=1)
        yield built.eval()
        groups.stop()


def mllama() -> Any:
    lang = CFG.language
    torch.manual_seed(0)
    config = MllamaTextConfig(
        vocab_size=lang.vocab_size,
        hidden_size=lang.hidden_size,
        num_hidden_layers=lang.num_layers,
        num_attention_heads=lang.num_heads,
        num_key_value_heads=lang.num_kv_heads,
        intermediate_size=lang.ffn_hidden_size,
        rms_norm_eps=lang.norm_eps,
        cross_attention_layers=list(lang.cross_attention_layers),
        rope_parameters={"rope_type": "default", "rope_theta": lang.rope_base},
        pad_token_id=0,
    )
    model = MllamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def load(chunk: VLM, theirs: Any) -> None:
    sizes = Sizes(heads=CFG.language.num_heads, kv_heads=CFG.language.num_kv_heads)
    state = {**theirs.state_dict(), "embed": theirs.model.embed_tokens.weight[: CFG.language.vocab_size]}
    rows: dict[str, tuple[Any, list[str]]] = {
        "embedding.word_embeddings.weight": (IDENTITY, ["embed"]),
        "decoder.final_layernorm.weight": (IDENTITY, ["model.norm.weight"]),
        "output_layer.weight": (IDENTITY, ["lm_head.weight"]),
    }
    for n in range(CFG.language.num_layers):
        mine, them = f"decoder.layers.{n}", f"model.layers.{n}"
        found: dict[str, tuple[Any, list[str]]] = {
            "input_layernorm.weight": (IDENTITY, ["input_layernorm.weight"]),
            "pre_mlp_layernorm.weight": (IDENTITY, ["post_attention_layernorm.weight"]),
            "mlp.linear_fc1.weight": (GATE_UP, ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
            "mlp.linear_fc2.weight": (IDENTITY, ["mlp.down_proj.weight"]),
        }
        if n in CFG.language.cross_attention_layers:
            found |= {
                "attention_gate": (IDENTITY, ["cross_attn_attn_gate"]),
                "mlp_gate": (IDENTITY, ["cross_attn_mlp_gate"]),
                "cross_attention.linear_q.weight": (IDENTITY, ["cross_attn.q_proj.weight"]),
                "cross_attention.linear_kv.weight": (KV, ["cross_attn.k_proj.weight", "cross_attn.v_proj.weight"]),
                "cross_attention.linear_proj.weight": (IDENTITY, ["cross_attn.o_proj.weight"]),
                "cross_attention.q_layernorm.weight": (IDENTITY, ["cross_attn.q_norm.weight"]),
                "cross_attention.k_layernorm.weight": (IDENTITY, ["cross_attn.k_norm.weight"]),
            }
        else:
            qkv = [f"self_attn.{x}_proj.weight" for x in "qkv"]
            found |= {
                "self_attention.linear_qkv.weight": (QKV, qkv),
                "self_attention.linear_proj.weight": (IDENTITY, ["self_attn.o_proj.weight"]),
            }
        rows |= {f"{mine}.{key}": (how, [f"{them}.{name}" for name in names]) for key, (how, names) in found.items()}
    ours = {p.boxes[0].key.removeprefix("language."): p.parameter for p in local_parameters([chunk])}
    assert {key for key in ours if key.startswith(("decoder", "embedding", "output"))} == set(rows)
    with torch.no_grad():
        for key, (transform, names) in rows.items():
            ours[key].copy_(transform.join([state[name] for name in names], sizes))


@torch.no_grad()
def expected(theirs: Any, sample: Sample, features: Tensor) -> Tensor:
    """transformers' logits of a sample alone; features: [E, D] of its images. The mask is its processor's."""
    tokens, views = sample
    ids = torch.tensor([tokens])
    if not views:
        return theirs(input_ids=ids).logits[0]
    mask = torch.zeros(1, len(tokens), 1, len(features))
    first = 0
    for (start, stop), count in zip(get_cross_attention_token_mask(tokens, tiny.IMAGE), views, strict=True):
        stop = len(tokens) if stop == -1 else stop  # to the end, where there is one image
        mask[0, start:stop, 0, first : first + 4 * count] = 1
        first += 4 * count
    mask, rows = _prepare_cross_attention_mask(mask, num_vision_tokens=1, dtype=torch.float32)
    return theirs(
        input_ids=ids,
        cross_attention_states=features[None],
        cross_attention_mask=mask,
        full_text_row_masked_out_mask=rows,
    ).logits[0]


def features_of(chunk: VLM, samples: list[Sample]) -> list[Tensor]:
    batch = model_batch(row(samples, 32), CFG, image_token=tiny.IMAGE, device=device.device())
    assert batch.views is not None
    return list(chunk.embed_images(batch.views).split([4 * sum(views) for _, views in samples]))


@torch.no_grad()
def test_equals_mllama_packed(chunk: VLM) -> None:
    theirs = mllama()
    load(chunk, theirs)
    batch = model_batch(row(SAMPLES, 32), CFG, image_token=tiny.IMAGE, device=device.device())
    logits = chunk(batch, gather_logits=True)[0]
    start = 0
    for sample, features in zip(SAMPLES, features_of(chunk, SAMPLES), strict=True):
        stop = start + len(sample[0])
        assert (logits[start:stop] - expected(theirs, sample, features)).abs().max() < 1e-4
        start = stop


@torch.no_grad()
def test_through_the_cache(chunk: VLM) -> None:
    """Prompts with and without images, then tokens that go on, one or several, and a row whose later turn brings an
    image: as one forward over all of it."""
    load(chunk, mllama())
    backend = TorchBackend(chunk, CFG, groups.lay_out(ParallelConfig(), seed=0), tiny.IMAGE, 4, 64)
    later: Sample = ([40, tiny.IMAGE, 41, 42], [1])
    first, second = [*SAMPLES[0][0], 50], [*SAMPLES[2][0], 51, 52]
    prompts = [Row(slot=n, start=0, tokens=s[0], images=images_of([s])) for n, s in enumerate(SAMPLES)]
    found = backend.run(prompts)
    for logits, sample in zip(found, SAMPLES, strict=True):
        assert np.abs(logits - whole(chunk, [sample])).max() < 1e-5
    found = backend.run(
        [
            Row(slot=0, start=11, tokens=[50]),
            Row(slot=1, start=5, tokens=later[0], images=images_of([later])),
            Row(slot=2, start=7, tokens=[51, 52]),
        ]
    )
    assert np.abs(found[0] - whole(chunk, [(first, SAMPLES[0][1])])).max() < 1e-5
    assert np.abs(found[2] - whole(chunk, [(second, SAMPLES[2][1])])).max() < 1e-5
    # A prompt without images in a slot that had one looks at nothing
    found = backend.run([Row(slot=0, start=0, tokens=[20, 21]), Row(slot=1, start=9, tokens=[60])])
    assert np.abs(found[0] - whole(chunk, [([20, 21], [])])).max() < 1e-5
    assert np.isfinite(found).all()


def images_of(samples: list[Sample]) -> Any:
    found = pictures(samples)
    arrays = {field.name: getattr(found, field.name) for field in fields(found)}
    return replace(found, **{name: x.numpy() for name, x in arrays.items() if x is not None})


def whole(chunk: VLM, samples: list[Sample]) -> np.ndarray:
    """The logits after the last token, by one training-like forward."""
    length = sum(len(ids) for ids, _ in samples)
    batch = model_batch(row(samples, length), CFG, image_token=tiny.IMAGE, device=device.device())
    return chunk(batch, gather_logits=True)[0, -1].numpy()


def test_who_looks_where() -> None:
    looks = make_looks([0, 6, 8, 11], [1, 4, 8], [2, 3, 4])
    assert looks.ranges == ((0, 1, ((0, 5),)), (1, 4, ((0, 2),)), (4, 6, ((2, 5),)), (8, 11, ((5, 9),)))
    assert looks.seen.flatten().tolist() == [False, *[True] * 5, False, False, *[True] * 3]
    neighbours = make_looks([0, 5], [1, 2], [2, 3])
    assert neighbours.ranges == ((0, 1, ((0, 5),)), (1, 2, ((0, 2),)), (2, 5, ((0, 5),)))
    filled = make_looks([0, 5], [1, 2], [4, 3], [2, 3])  # the first image's last two features only fill it up
    assert filled.ranges == ((0, 1, ((0, 7),)), (1, 2, ((0, 2),)), (2, 5, ((0, 2), (4, 7))))
    assert make_looks([0, 5], [], []).ranges == ()


@pytest.mark.parametrize(
    ("layers", "kind", "key"),
    [
        ([], "cross_attention", "model.language.cross_attention_layers"),
        ([1], "mlp", "model.projector.kind=mlp"),
        ([4], "cross_attention", "4 layers"),
    ],
)
def test_refuses(layers: list[int], kind: str, key: str) -> None:
    cfg = looking_model()
    cfg.language.cross_attention_layers, cfg.projector.kind = layers, kind
    with pytest.raises(UserError, match=key):
        check_looks(cfg)


def test_refuses_virtual_stages() -> None:
    with pytest.raises(UserError, match="set parallel.virtual=1"):
        check_layout(ParallelConfig(pipeline=2, virtual=2), looking_model(), world_size=2)
