"""Schedules, freezing, and who gets weight decay."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import UserError

pytestmark = pytest.mark.usefixtures("one_process")


def test_warm_up_and_cosine() -> None:
    factors = [optim.rate_factor(s, 100, 10, 0.1) for s in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[99] == pytest.approx(0.1) and factors[54] == pytest.approx(0.55, abs=0.02)
    assert all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="every part is frozen"):
        optim.part_rates(OptimConfig())


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_hold_nothing_and_do_not_move(distributed: bool, precision: str) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed)
    cfg = OptimConfig(projector_lr=1e-2, language_lr=3e-3, weight_decay=0.1)
    chunks = build_model(tiny.tiny_model(), parallel, precision, seed=0)
    before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    optim.freeze(chunks, optim.part_rates(cfg))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(cfg, parallel, precision, model)
    step.prepare_model(model)
    optim.set_rates(optimizer, cfg, 1, 10)
    batches = [model_batch(r, tiny.tiny_model(), image_token=tiny.IMAGE, device=device.device()) for r in tiny.rows(2)]
    result = step.train_step(model, optimizer, batches, clip=1.0)
    assert result.applied and result.loss_tokens == sum(r.supervised for r in tiny.rows(2))

    held = {id(s.parameter): s for s in optim.optimizer_slices(optimizer)}
    for name, parameter in chunks[0].named_parameters():
        frozen = name.startswith("vision")
        assert (id(parameter) in held) != frozen, name
        assert parameter.requires_grad != frozen
        if frozen:
            assert parameter.grad is None and not hasattr(parameter, "main_grad")
            assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[n]) for n, p in chunks[0].named_parameters() if n.startswith("language"))

    seen = set()
    for inner in optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for _ in group["params"]:
                seen.add((group["max_lr"], group["weight_decay"]))
    assert seen == {(1e-2, 0.1), (1e-2, 0.0), (3e-3, 0.1), (3e-3, 0.0)}


def test_gradient_does_not_depend_on_micro_batches() -> None:
    """The same samples as one row, as two rows and as four: gradients equal to 1e-6."""
    cfg = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    samples = [tiny.sample(i, 10 + 3 * i, i % 3) for i in range(4)]
    parallel = ParallelConfig(distributed_optimizer=False)
    gradients = []
    for split in ([4], [1, 3], [1, 1, 1, 1]):
        chunks = build_model(tiny.tiny_model(), parallel, "fp32", seed=0)
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(cfg, parallel, "fp32", model)
        step.prepare_model(model)
        rows, at = [], 0
        for count in split:
            rows.append(tiny.row(samples[at : at + count], 64))
            at += count
        batches = [model_batch(r, tiny.tiny_model(), image_token=tiny.IMAGE, device=device.device()) for r in rows]
        for chunk in model:
            chunk.zero_grad_buffer()
        step.run_schedule(model, batches)
        gradients.append({n: p.main_grad.clone() for n, p in chunks[0].named_parameters()})
        del optimizer
    for name, reference in gradients[0].items():
        for other in gradients[1:]:
            assert (reference - other[name]).abs().max() < 1e-6, name


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    cfg = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    parallel = ParallelConfig()
    chunks = build_model(tiny.tiny_model(), parallel, "fp32", seed=0)
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(cfg, parallel, "fp32", model)
    before = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
    for chunk in model:
        chunk.zero_grad_buffer()
    next(iter(chunks[0].parameters())).main_grad.fill_(float("nan"))
    norm = float(optim.gradient_norm(optimizer))
    assert norm != norm and not optim.update(optimizer, norm, clip=1.0)
    assert all(torch.equal(p, before[n]) for n, p in chunks[0].named_parameters())
