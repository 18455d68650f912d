"""What the plan says of a GPU's memory, against the step on tensors that say they are a GPU's (tests/pretended.py):
there torch takes CUDA's own operations, and what they keep is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import compositions
from tests.compositions import IMAGE
from tests.on_cuda import STAGES, Case, alone, build
from tests.pretended import pretend
from vlm_nemo.check import meter as meters
from vlm_nemo.check import rows
from vlm_nemo.check.meter import Meter
from vlm_nemo.check.needs import StageNeeds, stage_needs
from vlm_nemo.check.plan import changed
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.share import embedders
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.step import run_schedule
from vlm_nemo.types import PackedBatch


def on_gpu(guard: Path, cases: list[Case]) -> list[int]:
    """Of each: bytes of the worst moment of one micro-batch beyond weights and gradients."""
    found = []
    F.scaled_dot_product_attention = _sdpa  # type: ignore[assignment]
    meters.FORMULAS = {}  # arithmetic is not asked for, and no length is known there
    for case in cases:
        with pretend(guard, ParallelConfig(**case.layout), world=case.world, rank=case.rank) as gpu:
            run = build(gpu, case)
            batch = run.batches()[0]
            for chunk in run.model:
                chunk.config.finalize_model_grads_func = None
            with gpu.running():
                meter = Meter()
                held = meter.include([p.data for chunk in run.model for p in chunk.parameters()])
                held += meter.include(
                    [b.grad_data for c in run.model for b in (*c.buffers, *c.expert_parallel_buffers)]
                )
                meter.restart()
                with meter:
                    run_schedule(run.model, [batch])
            found.append(meter.peak - held)
    return found


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the kernels that CUDA has for it in half precision; without them torch makes a matrix of all scores."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0]


def planned(case: Case, row: PackedBatch | None = None) -> StageNeeds:
    """What a rehearsal says of the first stage; row: of the compositions', unless given."""
    cfg, parallel = case.config(), ParallelConfig(**case.layout)
    batch = model_batch(
        row or compositions.rows(cfg, 2, 0, capacity=256)[0],
        cfg,
        image_token=IMAGE if row is None else rows.IMAGE,
        device=torch.device("cpu"),
        context=(0, parallel.context),
        sharing=(0, embedders(parallel, kept=False).ranks),
    )
    given = (cfg, parallel, case.precision, STAGES[case.stage], lambda change: changed(batch, change))
    return stage_needs(*given, world=case.world, stage=0, micro=1)


CASES = {
    "llava": Case(),
    "selective": Case(language="qwen2", layout=dict(recompute="selective")),
    "full": Case(language="qwen2", stage=3, layout=dict(recompute="full", recompute_vision="full")),
    "frozen": Case(stage=1),
    "qwen2.5-vl": Case(tower="qwen25_vit", reduction="merge", language="qwen2_vl", stage=3),
    "gemma3": Case(tower="siglip", reduction="average_pool", projector="gemma", language="gemma3", stage=3),
    "llama3.2": Case(tower="llama32", projector="cross_attention"),
    "ovis": Case(tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary", stage=3),
    "experts": Case(experts=4, layout=dict(expert=2), world=2),
    "sequence": Case(language="qwen3", layout=dict(tensor=2, sequence=True), world=2),
    "context": Case(language="mistral", layout=dict(context=2), world=2),
}


def test_it_is_that_of_cudas_operations(guard: Path) -> None:
    """But for what a CPU's LayerNorm keeps in half precision and CUDA's in fp32: a number or two of a row."""
    there = dict(zip(CASES, alone(on_gpu, guard, list(CASES.values())), strict=True))
    here = {name: planned(case).activations for name, case in CASES.items()}
    assert here == pytest.approx(there, rel=0.002)
