"""Gradients summed while the backward pass runs and weights collected while the next forward pass does: the losses,
gradient norms and weights of one process that does one thing after the other."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from tests import compositions, tiny
from tests.compositions import Composition
from tests.parallel.test_layouts import train_all
from tests.ranks import run_ranks
from vlm_nemo.check.trial import open_gates
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch

BOTH: dict[str, Any] = dict(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "data 2": BOTH,
        "data 2, gradients only": dict(distributed_optimizer=False, overlap_grad_reduce=True),
        "pipeline 2, virtual 2": dict(pipeline=2, virtual=2, **BOTH),
    },
    4: {
        "tensor 2, data 2, sequence": dict(tensor=2, sequence=True, **BOTH),
        "pipeline 2, data 2": dict(pipeline=2, **BOTH),
    },
}
CASES = ["stage1", "tied"]
"""Of test_layouts."""


WAITS = {
    "tiles": Composition(
        layout="canvas", tower="llama32", reduction="none", projector="cross_attention", language="llama"
    ),
    "words": Composition(tower="siglip", reduction="none", projector="visual_vocabulary", language="llama"),
}
"""Weights of modules that are never called themselves."""


def in_small_buckets(size: int = 4000) -> None:
    """Several of them are on their way at once."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from vlm_nemo.train import optim

    optim.DistributedDataParallelConfig = partial(  # type: ignore[misc,assignment]
        DistributedDataParallelConfig, bucket_size=size
    )


def overlapped(pairs: list[tuple[dict[str, Any], str]]) -> tuple[list[list[tuple[float, float]]], bool]:
    """Losses and norms of every layout and case; and whether the weights end up the same, to the bit where the sum has
    two terms and no order."""
    in_small_buckets()
    histories = train_all(pairs)
    if torch.distributed.get_world_size() > 2:
        return histories, True
    return histories, not unlike(tiny.tiny_model(), tiny.rows(4))


def unlike(cfg: ModelConfig, rows: list[PackedBatch]) -> list[str]:
    """Weights that differ after two steps of either kind, to the bit."""
    plain, both = (weights(ParallelConfig(**layout), cfg, rows) for layout in (dict(distributed_optimizer=True), BOTH))
    return [name for name, found in plain.items() if not torch.equal(found, both[name])]


def weights(parallel: ParallelConfig, cfg: ModelConfig, rows: list[PackedBatch]) -> dict[str, torch.Tensor]:
    """After two steps, read without another forward pass."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    rates = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    with device.adapter():
        ranks = groups.lay_out(parallel, seed=0)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        open_gates(chunks)
        model = optim.wrap(chunks, parallel)
        assert not parallel.overlap_grad_reduce or len(model[0].bucket_groups) > 3
        optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
        step.prepare_model(model)
        optim.set_rates(optimizer, rates, 1, 2)
        mine = rows[ranks.data_rank :: ranks.data]
        batches = [model_batch(row, cfg, image_token=tiny.IMAGE, device=device.device()) for row in mine]
        for _ in range(2):
            # Not clipped: the norm is a sum over the ranks' shares, and buckets cut these elsewhere
            step.train_step(model, optimizer, batches, clip=0.0)
        optim.settle(model)
        return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}


def a_bucket_each() -> dict[str, list[str]]:
    """Of every composition: weights that differ where no weight comes with another one."""
    from vlm_nemo.runtime import device, groups

    in_small_buckets(1)
    found = {}
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for name, composition in WAITS.items():
            cfg = composition.config()
            found[name] = unlike(cfg, compositions.rows(cfg, 4, 1000, capacity=192))
    return found


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[tuple[float, float]]]:
    alone = dict(distributed_optimizer=False)
    return dict(zip(CASES, run_ranks(train_all, 1, [(alone, case) for case in CASES])[0], strict=True))


def test_no_weight_is_used_before_it_is_there() -> None:
    """A stale one would show in the second step's gradients."""
    for found in run_ranks(a_bucket_each, 2):
        assert found == {name: [] for name in WAITS}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_overlap_changes_nothing(world: int, one_process: dict[str, list[tuple[float, float]]]) -> None:
    pairs = list(itertools.product(LAYOUTS[world], CASES))
    for histories, same in run_ranks(overlapped, world, [(LAYOUTS[world][name], case) for name, case in pairs]):
        assert same
        for (name, case), history in zip(pairs, histories, strict=True):
            for (loss, norm), (true_loss, true_norm) in zip(history, one_process[case], strict=True):
                assert loss == pytest.approx(true_loss, rel=1e-5), (name, case)
                assert norm == pytest.approx(true_norm, rel=1e-5), (name, case)
