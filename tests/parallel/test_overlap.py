"""Gradients summed while the backward pass runs and weights collected while the next forward pass does: the losses,
gradient norms and weights of one process that does one thing after the other."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from tests import tiny
from tests.parallel.test_layouts import train_all
from tests.ranks import run_ranks
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

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


def in_small_buckets() -> None:
    """Several of them are on their way at once."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from vlm_nemo.train import optim

    optim.DistributedDataParallelConfig = partial(  # type: ignore[misc,assignment]
        DistributedDataParallelConfig, bucket_size=4000
    )


def overlapped(pairs: list[tuple[dict[str, Any], str]]) -> tuple[list[list[tuple[float, float]]], bool]:
    """Losses and norms of every layout and case; and whether the weights end up the same, to the bit where the sum has
    two terms and no order."""
    in_small_buckets()
    histories = train_all(pairs)
    if torch.distributed.get_world_size() > 2:
        return histories, True
    plain, both = (weights(ParallelConfig(**layout)) for layout in (dict(distributed_optimizer=True), BOTH))
    return histories, all(torch.equal(one, other) for one, other in zip(plain, both, strict=True))


def weights(parallel: ParallelConfig) -> list[torch.Tensor]:
    """After two steps, read without another forward pass."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg, rates = tiny.tiny_model(), OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    with device.adapter():
        ranks = groups.lay_out(parallel, seed=0)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        model = optim.wrap(chunks, parallel)
        assert not parallel.overlap_grad_reduce or len(model[0].bucket_groups) > 3
        optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
        step.prepare_model(model)
        optim.set_rates(optimizer, rates, 1, 2)
        mine = tiny.rows(4)[ranks.data_rank :: ranks.data]
        batches = [model_batch(row, cfg, image_token=tiny.IMAGE, device=device.device()) for row in mine]
        for _ in range(2):
            # Not clipped: the norm is a sum over the ranks' shares, and buckets cut these elsewhere
            step.train_step(model, optimizer, batches, clip=0.0)
        optim.settle(model)
        return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[tuple[float, float]]]:
    alone = dict(distributed_optimizer=False)
    return dict(zip(CASES, run_ranks(train_all, 1, [(alone, case) for case in CASES])[0], strict=True))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_overlap_changes_nothing(world: int, one_process: dict[str, list[tuple[float, float]]]) -> None:
    pairs = list(itertools.product(LAYOUTS[world], CASES))
    for histories, same in run_ranks(overlapped, world, [(LAYOUTS[world][name], case) for name, case in pairs]):
        assert same
        for (name, case), history in zip(pairs, histories, strict=True):
            for (loss, norm), (true_loss, true_norm) in zip(history, one_process[case], strict=True):
                assert loss == pytest.approx(true_loss, rel=1e-5), (name, case)
                assert norm == pytest.approx(true_norm, rel=1e-5), (name, case)
