"""The choice of kernels, with stand-ins for what is not installed here: which are taken, and what they are given.

No GPU computed anything: the stand-ins for layers are megatron-core's own, that for FlashAttention computes nothing.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.extensions import transformer_engine as theirs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from tests.runs import ROOT
from tests.tiny import tiny_model
from vlm_nemo.model import attention, kernels
from vlm_nemo.model.attention import varlen_attention
from vlm_nemo.model.language import language_config, language_model
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.segments import make_segments
from vlm_nemo.model.transformer import transformer_config
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import check_layout
from vlm_nemo.types import UserError

Install = Callable[..., None]
FLASH = """
import torch
calls = []
def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert cu_q.tolist() == cu_k.tolist() and max_q == max_k
    calls.append((tuple(k.shape), cu_q.tolist(), max_q, softmax_scale, causal, window_size))
    return torch.zeros_like(q)
"""
APEX = """
import torch
def fused_rms_norm_affine(x, weight, shape, eps):
    return torch.nn.functional.rms_norm(x, shape, weight, eps) + 1
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts stand-ins where they are found: "a.b" = "its text"."""
    before = set(sys.modules)

    def do(**modules: str) -> None:
        for name, text in modules.items():
            file = tmp_path / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        forget()

    def forget() -> None:
        importlib.invalidate_caches()
        kernels.has.cache_clear()
        kernels._flash.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield do
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("transformer_engine", "apex") or name.startswith(("flash_attn", "fused_")):
            del sys.modules[name]
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr(device, "capability", lambda: 9)


def test_nothing_is_there_and_nobody_hears_of_it() -> None:
    """Import, build, one forward and backward pass in a fresh interpreter: not a line."""
    text = """
import torch, vlm_nemo
from tests import tiny
from vlm_nemo.model import kernels
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig

with device.adapter():
    groups.start(ParallelConfig(), seed=0)
    (model,) = build_model(tiny.tiny_model(), ParallelConfig(recompute="selective"), "fp32", 0)
    batch = model_batch(tiny.rows(1)[0], tiny.tiny_model(), image_token=tiny.IMAGE, device=torch.device("cpu"))
    model.train()(batch).sum().backward()
    groups.stop()
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_is_taken_where_it_is(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    class Column(ColumnParallelLinear):
        pass

    class Row(RowParallelLinear):
        pass

    class TheirNorm(Norm):
        pass

    for name, stand_in in {"TEColumnParallelLinear": Column, "TERowParallelLinear": Row, "TENorm": TheirNorm}.items():
        monkeypatch.setattr(theirs, name, stand_in)
    install(transformer_engine____init__="", transformer_engine__pytorch="")
    taken = kernels.choose("auto", "hybrid")
    assert kernels.choose("te") == taken and kernels.choose("plain") == kernels.PLAIN
    monkeypatch.setattr(device, "on_cuda", lambda: False)  # what follows is built here
    cfg, parallel = tiny_model(), ParallelConfig()
    with device.adapter():
        groups.start(parallel, seed=0)
        config = language_config(cfg.language, parallel, torch.float32, {}, taken)
        model = language_model(cfg.language, config, first=True, last=True, vp_stage=None, kernels=taken)
        plain = language_model(cfg.language, config, first=True, last=True, vp_stage=None)
        tower = VisionTower(cfg.vision, parallel, torch.float32, taken)
        groups.stop()
    for layer in (*model.decoder.layers, *tower.blocks.layers):
        assert type(layer.self_attention.linear_qkv) is type(layer.mlp.linear_fc1) is Column
        assert type(layer.self_attention.linear_proj) is type(layer.mlp.linear_fc2) is Row
        assert type(layer.input_layernorm) is type(layer.pre_mlp_layernorm) is TheirNorm
    assert type(model.decoder.final_layernorm) is TheirNorm
    names = [{name for name, _ in one.named_parameters()} for one in (model, plain)]
    assert names[0] == names[1], "a checkpoint's names"
    assert not config.gradient_accumulation_fusion and config.fp8 is None
    assert language_config(cfg.language, parallel, torch.bfloat16, {}, taken, "hybrid").fp8 == "hybrid"


@pytest.mark.usefixtures("gpu")
def test_apex_is_taken_where_it_is(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(apex____init__="", apex__normalization____init__="", apex__normalization__fused_layer_norm=APEX)
    assert kernels.choose("auto") == kernels.PLAIN, "without its compiled parts"
    for name in ("fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda"):
        install(**{name: ""})
    taken = kernels.choose("auto")
    assert taken.norm is kernels.ApexNorm and taken.column is ColumnParallelLinear and taken.fused_gradients
    monkeypatch.setattr(device, "on_cuda", lambda: False)
    assert kernels.choose("auto") == kernels.PLAIN
    sizes = dict(num_layers=1, hidden_size=4, num_attention_heads=1, normalization="RMSNorm")
    config = transformer_config(ParallelConfig(), torch.float32, pipelined=True, kernels=taken, **sizes)
    assert config.gradient_accumulation_fusion
    x = torch.randn(3, 4)
    assert torch.equal(taken.norm(config, 4)(x), Norm(config, 4)(x) + 1)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("installed", "generation", "taken"),
    [
        (["flash_attn"], 9, "flash_attn"),
        (["flash_attn", "flash_attn_interface"], 9, "flash_attn_interface"),
        (["flash_attn", "flash_attn_interface"], 8, "flash_attn"),
    ],
)
def test_flash_attention_is_taken_where_it_is(
    install: Install, monkeypatch: pytest.MonkeyPatch, installed: list[str], generation: int, taken: str
) -> None:
    monkeypatch.setattr(device, "capability", lambda: generation)
    install(**dict.fromkeys(installed, FLASH))
    segments = make_segments(torch.tensor([0, 3, 8], dtype=torch.int32), 8)
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    assert varlen_attention(q, k, k, segments, 0.5, 4).shape == q.shape
    varlen_attention(q, k, k, segments, None)
    assert importlib.import_module(taken).calls == [
        ((8, 2, 16), [0, 3, 8], 5, 0.5, True, (3, 0)),
        ((8, 2, 16), [0, 3, 8], 5, None, True, (-1, -1)),
    ]


def test_what_is_not_there_is_refused() -> None:
    assert kernels.choose("auto") == kernels.PLAIN and kernels.flash_attention() is None
    with pytest.raises(UserError, match="model.kernels=te needs TransformerEngine and a GPU"):
        kernels.choose("te")
    with pytest.raises(UserError, match="model.fp8=hybrid needs TransformerEngine's layers"):
        kernels.choose("auto", "hybrid")
    model = tiny_model()
    model.fp8 = "e4m3"
    with pytest.raises(UserError, match="a micro-batch has 40 on 1 ranks; make data.pack.capacity a multiple of 16"):
        check_layout(ParallelConfig(), model, world_size=1, global_packs=4, capacity=40)


class OnGpu(torch.Tensor):
    """Says that it is there."""

    is_cuda = True


@pytest.mark.parametrize(("generation", "varlen"), [(7, False), (8, True), (9, True)])
def test_gpus_that_the_kernels_do_not_run_on_go_by_rectangles(
    monkeypatch: pytest.MonkeyPatch, generation: int, varlen: bool
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(device, "capability", lambda: generation)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *rest: taken.append(len(q)) or q)
    segments = make_segments(torch.tensor([0, 3, 8], dtype=torch.int32), 8)
    q = torch.randn(8, 4, 16, dtype=torch.bfloat16).as_subclass(OnGpu)
    out = attention.packed_attention(q, q, q, segments, None)
    assert taken == [8] * varlen
    wanted = q if varlen else attention.packed_attention(*[q.as_subclass(torch.Tensor)] * 3, segments, None)
    assert torch.equal(out, wanted)
