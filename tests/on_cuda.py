"""A model on a GPU that is not there (pretended.py), its optimizer and its rows: what the tests of CUDA's lines run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.nn.attention.varlen import varlen_attn

from tests import compositions
from tests.compositions import NATURAL, Composition, Part
from tests.pretended import Attention, Gpu
from tests.ranks import run_ranks
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig

FEWER = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether torch's kernel takes fewer heads of keys than of queries: 2.11's is given repeated ones."""
STAGES = {
    1: OptimConfig(projector_lr=1e-3),
    2: OptimConfig(projector_lr=1e-3, language_lr=1e-3),
    3: OptimConfig(vision_lr=1e-4, projector_lr=1e-3, language_lr=1e-3),
}


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
        language: Part = dict(
            head_dim=self.head_dim, moe=moe, mrope_section=[2 * n for n in cfg.language.mrope_section]
        )
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


def asked(
    *, heads: int = 4, kv_heads: int = 2, window: tuple[int, int] = (-1, 0), more_keys: bool = False
) -> Attention:
    """A decoder's attention."""
    return Attention(
        heads=heads,
        kv_heads=kv_heads if FEWER else heads,
        dim=16,
        segments=0,
        causal=window == (-1, 0),
        window=window,
        more_keys=more_keys,
    )
