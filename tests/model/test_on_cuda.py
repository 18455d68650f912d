"""The lines that only CUDA runs, on tensors that say they are there and hold nothing (tests/pretended.py).

A wrong device, type or shape raises there as it would on a GPU; so does a look at a value, which would stop the host.
What kernels compute nobody sees.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
)

from tests import compositions, pretended
from tests.compositions import NATURAL, Composition
from tests.pretended import Gpu, pretend
from tests.ranks import run_ranks
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.torch_backend import TorchBackend
from vlm_nemo.model import attention, vlm
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.segments import make_segments
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.host import HostCopies
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.vision_cache import Keeper
from vlm_nemo.types import Images

STAGES = {
    1: OptimConfig(projector_lr=1e-3),
    2: OptimConfig(projector_lr=1e-3, language_lr=1e-3),
    3: OptimConfig(vision_lr=1e-4, projector_lr=1e-3, language_lr=1e-3),
}


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and nothing to pretend")
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    return pretended.compile_guard(tmp_path_factory.mktemp("guard"))


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own."""
    return run_ranks(function, 1, *args)[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of training."""

    tower: str = "clip"
    reduction: str = "none"
    projector: str = "mlp"
    language: str = "llama"
    stage: int = 2
    precision: str = "bf16"
    layout: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    rank: int = 0
    experts: int | None = None
    head_dim: int = 16
    """Of the decoder; the tower's heads have 16"""

    def config(self) -> ModelConfig:
        kind = NATURAL.get(self.tower, "square")
        parts = dict(tower=self.tower, reduction=self.reduction, projector=self.projector, language=self.language)
        cfg = Composition(layout=kind, **parts).config()
        moe = MoeConfig(experts=self.experts, aux_loss=0.01, z_loss=0.001)
        language = dict(head_dim=self.head_dim, moe=moe, mrope_section=[2 * n for n in cfg.language.mrope_section])
        language |= {} if "pipeline" in self.layout or cfg.language.cross_attention_layers else dict(num_layers=2)
        return replace(cfg, vision=replace(cfg.vision, hidden_size=64), language=replace(cfg.language, **language))


@dataclass(kw_only=True)
class Run:
    """A model on the GPU, its optimizer, and rows as the host has them."""

    cfg: ModelConfig
    model: list[Any]
    optimizer: Any
    rows: list[Any]
    places: dict[str, tuple[int, int]]

    def batches(self) -> list[ModelBatch]:
        where = device.device()
        return [
            model_batch(row, self.cfg, image_token=compositions.IMAGE, device=where, **self.places) for row in self.rows
        ]

    def step(self, batches: list[ModelBatch]) -> step.StepResult:
        return step.train_step(self.model, self.optimizer, batches, clip=0.5)


def build(gpu: Gpu, case: Case) -> Run:
    """Two rows: one with images, one without."""
    cfg, parallel, rates = case.config(), ParallelConfig(**case.layout), STAGES[case.stage]
    ranks = groups.lay_out(parallel, seed=0)
    with gpu.running():
        chunks = build_model(cfg, parallel, case.precision, seed=0, fresh=())
        optim.freeze(chunks, optim.part_rates(rates))
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(rates, parallel, case.precision, model)
        step.prepare_model(model)
        optim.set_rates(optimizer, rates, 1, 10)
    places = {"context": (ranks.context_rank, ranks.context), "sharing": chunks[0].image_place}
    rows = compositions.rows(cfg, 2, 0, capacity=256)
    gpu.waits.clear()
    gpu.attention.clear()
    return Run(cfg=cfg, model=model, optimizer=optimizer, rows=rows, places=places)


def waits_of(guard: Path, cases: list[Case]) -> list[tuple[dict[str, int], dict[str, int], set[Any]]]:
    """Of each: what the host waited for while the rows were moved, and in the step; and what attention was asked."""
    found = []
    for case in cases:
        with pretend(guard, ParallelConfig(**case.layout), world=case.world, rank=case.rank) as gpu:
            run = build(gpu, case)
            batches = run.batches()
            moved, gpu.waits = dict(gpu.waits), gpu.waits.__class__()
            with gpu.running():
                assert run.step(batches).applied
            found.append((moved, dict(gpu.waits), {replace(asked, segments=0) for asked in gpu.attention}))
    return found


def asked(*, heads: int = 4, kv_heads: int = 2, window: tuple[int, int] = (-1, 0), more_keys: bool = False) -> Any:
    """A decoder's attention."""
    return pretended.Attention(
        heads=heads, kv_heads=kv_heads, dim=16, segments=0, causal=window == (-1, 0), window=window, more_keys=more_keys
    )


TOWER = pretended.Attention(heads=4, kv_heads=4, dim=16, segments=0, causal=False, window=(-1, -1), more_keys=False)
FAMILIES = {
    "llava": [
        (Case(stage=1), {asked()}),
        (Case(layout=dict(recompute="selective")), {asked()}),
        (Case(language="qwen2", stage=3, layout=dict(recompute="full", recompute_vision="full")), {asked()}),
    ],
    "qwen2.5-vl": [
        (Case(tower="qwen25_vit", reduction="merge", language="qwen2_vl", stage=3), {asked(), TOWER}),
    ],
    "gemma3": [
        (
            Case(tower="siglip", reduction="average_pool", projector="gemma", language="gemma3", stage=3),
            {asked(), asked(window=(7, 0))},
        ),
        (Case(language="mistral", stage=1), {asked(window=(5, 0))}),
        (Case(language="mistral", head_dim=12), set()),  # the kernel would refuse these heads
        (Case(language="gemma3", head_dim=264), set()),
    ],
    "llama3.2": [(Case(tower="llama32", projector="cross_attention"), {asked()})],
    "ovis": [(Case(tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary", stage=3), {asked()})],
    "mixtral": [
        (Case(experts=4), {asked()}),
        (Case(experts=4, layout=dict(expert=2, recompute="selective"), world=2), {asked()}),
    ],
    "fp32": [(Case(tower="qwen2_vit", reduction="merge", language="gemma3", precision="fp32"), set())],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_once(guard: Path, family: str) -> None:
    """And nothing waits while rows are moved. Attention goes through the variable-length kernel, window and all. (How
    many tokens an expert gets is made up on shapes; on a GPU its layer waits for that, see Dispatcher.)"""
    cases, wanted = zip(*FAMILIES[family], strict=True)
    for (moved, waited, seen), attention_asked in zip(alone(waits_of, guard, list(cases)), wanted, strict=True):
        assert (moved, waited, seen) == ({}, {"tolist": 1}, attention_asked)


LAYOUTS = {
    "tensor": [
        (Case(layout=dict(tensor=2), world=2), {asked(heads=2, kv_heads=1)}),
        (
            Case(language="gemma3", layout=dict(tensor=2, sequence=True, vision=1), world=2, rank=1),
            {asked(heads=2, kv_heads=1), asked(heads=2, kv_heads=1, window=(7, 0))},
        ),
    ],
    "context": [
        (Case(language="mistral", layout=dict(context=2), world=2), {asked(window=(5, 0), more_keys=True)}),
        (
            Case(language="gemma3", stage=1, layout=dict(context=2), world=2, rank=1),
            {asked(more_keys=True), asked(window=(7, 0), more_keys=True)},
        ),
    ],
    "data": [
        (Case(layout=dict(overlap_grad_reduce=True, overlap_param_gather=True), world=2), {asked()}),
        (Case(layout=dict(distributed_optimizer=False), world=2), {asked()}),
    ],
    "pipeline": [(Case(language="qwen2", layout=dict(pipeline=2), world=2, rank=rank), {asked()}) for rank in (0, 1)],
    "interleaved": [(Case(layout=dict(pipeline=2, virtual=2), world=2, rank=rank), {asked()}) for rank in (0, 1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_does_every_layout(guard: Path, layout: str) -> None:
    cases, wanted = zip(*LAYOUTS[layout], strict=True)
    for (moved, waited, seen), attention_asked in zip(alone(waits_of, guard, list(cases)), wanted, strict=True):
        assert (moved, waited, seen) == ({}, {"tolist": 1}, attention_asked)


SEEN = {
    "copy to cuda": [
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.zeros(3).to(x.device, non_blocking=True),  # it is not pinned
        lambda x: x[0].copy_(torch.zeros(4)),
        lambda x: x[[1, 0]],
    ],
    "copy to cpu": [lambda x: x.cpu(), lambda x: torch.empty(2, 4).copy_(x, non_blocking=True)],
    "index from the host": [lambda x: x[torch.tensor([0, 1])]],
    "synchronize": [lambda x: torch.cuda.synchronize()],
    "tolist": [lambda x: x.tolist()],
}
"""What is counted, and what must be counted so."""
RAISES: dict[type[Exception], list[Callable[[Tensor], object]]] = {
    DataDependentOutputException: [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0, 0])],
    DynamicOutputShapeException: [Tensor.nonzero, lambda x: x[x > 0]],
    FakeTensorDeviceMismatchError: [lambda x: x + torch.ones(2, 4), lambda x: torch.cat((x, torch.ones(2, 4)))],
}


def planted(guard: Path) -> None:
    """What this file looks for is seen where it is put."""
    with pretend(guard) as gpu, gpu.running():
        x = torch.empty(2, 4, device="cuda")
        for name, plants in SEEN.items():
            for number, plant in enumerate(plants):
                gpu.waits.clear()
                plant(x)
                assert gpu.waits == {name: 1}, (name, number, gpu.waits)
        for error, plants in RAISES.items():
            for plant in plants:
                with pytest.raises(error):
                    plant(x)
        gpu.waits.clear()
        pinned = torch.empty(2, 4, pin_memory=True)
        pinned[:1].copy_(x[:1], non_blocking=True)
        x[1].fill_(0)[x[1] > 0] = 1
        assert not gpu.waits, "none of these waits"


def planted_in_a_step(guard: Path) -> dict[str, int]:
    with pretend(guard) as gpu:
        run = build(gpu, Case())
        batches, real = run.batches(), vlm.place_images

        def looking(x: Tensor, *given: Any) -> Tensor:
            one = torch.ones(1, dtype=torch.int64)
            x.register_hook(lambda grad: grad * one.to(grad.device))  # in the backward pass
            return real(x * one.to(x.device), *given)

        vlm.place_images = looking
        with gpu.running():
            run.step(batches)
        return dict(gpu.waits)


def test_what_is_planted_is_seen(guard: Path) -> None:
    alone(planted, guard)
    assert alone(planted_in_a_step, guard) == {"tolist": 1, "copy to cuda": 4}, "two rows, there and back"


def kernel_calls(guard: Path) -> None:
    """What torch 2.11 takes: no flag for fewer heads of keys, which are repeated for it."""
    with pretend(guard) as gpu:
        segments = make_segments(torch.tensor([0, 24, 64], dtype=torch.int32), 64)
        with gpu.running():
            segments = segments.moved(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
            q, k, v = (
                torch.empty(64, heads, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for heads in (4, 2, 2)
            )
            attention.packed_attention(q, k, v, segments, 0.1, 8).sum().backward()
            attention._varlen_takes_fewer = lambda: False
            attention.packed_attention(q, k, v, segments, None).sum().backward()
            assert k.grad is not None and k.grad.shape == k.shape and k.grad.is_cuda
        first, second = gpu.attention
        assert (first.kv_heads, first.window, first.causal, first.segments) == (2, (7, 0), False, 2)
        assert (second.kv_heads, second.window, second.causal) == (4, (-1, 0), True)


def test_the_kernel_of_torch_2_11(guard: Path) -> None:
    alone(kernel_calls, guard)


def kept(guard: Path) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    """A frozen tower's features go to the host's pinned memory beside the step; nothing waits for them there."""

    class Store:
        def add(self, key: bytes, part: Tensor) -> None:
            assert part.device.type == "cpu"
            found.append((key[0], *part.shape))

        def close(self) -> None:
            pass

    found: list[tuple[int, ...]] = []
    with pretend(guard) as gpu:
        run = build(gpu, Case())
        (batch, _), (row, _) = run.batches(), run.rows
        keeper = Keeper(Store(), spec_of(run.cfg))  # type: ignore[arg-type]
        keys = tuple(bytes([n]) for n in range(row.images.count))
        with gpu.running():
            run.step([keeper.keeping(batch, replace(row, image_keys=keys))])
        keeper.close()
        return found, dict(gpu.waits)


def test_features_are_kept_beside_the_step(guard: Path) -> None:
    rows, width = 16, 64
    assert alone(kept, guard) == ([(n, rows, width) for n in range(3)], {"tolist": 1})


def copied(guard: Path) -> dict[str, int]:
    with pretend(guard) as gpu, gpu.running():
        tensors = [torch.empty(5, 3, dtype=torch.bfloat16, device="cuda"), torch.empty(7, device="cuda")]
        copies = HostCopies().take(tensors)
        for tensor, copy in zip(tensors, copies, strict=True):
            assert copy.shape == tensor.shape and copy.dtype == tensor.dtype
            assert copy.device.type == "cpu" and gpu.is_pinned(copy)
        return dict(gpu.waits)


def test_a_save_waits_once_for_its_copies(guard: Path) -> None:
    assert alone(copied, guard) == {"synchronize": 1}


def generated(guard: Path) -> set[Any]:
    """A prompt with an image and one without; then both go on, beside a new prompt."""
    case = Case(tower="siglip", reduction="average_pool", projector="gemma", language="gemma3")

    def go_on(slot: int, start: int, *tokens: int) -> Row:
        return Row(slot=slot, start=start, tokens=tokens)

    FakeTensor.numpy = lambda tensor: np.zeros(tensor.shape, dtype=np.float32)  # type: ignore[method-assign]
    with pretend(guard) as gpu:
        run = build(gpu, case)
        (chunk,), ranks = run.model, groups.lay_out(ParallelConfig(), seed=0)
        backend = TorchBackend(chunk.module, run.cfg, ranks, compositions.IMAGE, slots=4, capacity=64)
        picture = compositions.rows(run.cfg, 1, 0, capacity=96, images=[(1,)])[0]
        images = Images(**{name: None if x is None else x.numpy() for name, x in vars(picture.images).items()})
        prompt = Row(slot=0, start=0, tokens=picture.tokens[: picture.used_tokens].tolist(), images=images)
        start = picture.used_tokens
        for rows in (
            [prompt, go_on(1, 0, *range(5, 25))],
            [go_on(2, 0, 5, 6, 7), go_on(0, start, 7), go_on(1, 20, 8, 9)],
            [go_on(0, start + 1, 7), go_on(2, 3, 9)],
        ):
            batch = backend._batch(rows)
            backend._batch = lambda rows, batch=batch: batch  # type: ignore[method-assign]
            with gpu.running(), torch.no_grad():
                assert backend._logits(rows).shape == (len(rows), run.cfg.language.vocab_size)
            del backend._batch
        return {replace(asked, segments=0) for asked in gpu.attention}


def test_generation(guard: Path) -> None:
    """Prompts through the variable-length kernel, the rest through the cache, all of it on the device."""
    assert alone(generated, guard) == {asked(), asked(window=(7, 0))}
