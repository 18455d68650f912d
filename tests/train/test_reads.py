"""How often a training step stops the host to look at a number on the device: once. Counted on the CPU, where nothing
waits, but the same operations run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from tests import tiny
from tests.ranks import run_ranks
from vlm_nemo.model import vlm
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig

LOOKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount")
"""Operations of torch whose result's value or size the host must know."""
ITS_OWN = ("aten::_fused_adamw_", "aten::_index_put_impl_")
"""On the CPU AdamW's kernel reads its count of steps, which CUDA's takes from where it is; x[mask] = 0 reads its 0,
which torch keeps on the host."""
TAKEN = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
"""What takes a tensor to the host without such an operation."""
STAGE2 = OptimConfig(projector_lr=1e-2, language_lr=1e-2)


class Taken(TorchFunctionMode):
    """Counts tensors taken to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_host = func is torch.Tensor.to and "cpu" in [str(a) for a in (*args[1:], *(kwargs or {}).values())]
        if func in TAKEN or to_host:
            self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def reads(function: Callable[[], object]) -> dict[str, int]:
    """What was looked at, and how often."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded, Taken() as taken:
        function()
    found = taken.count
    for event in recorded.events() or []:
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and name in LOOKS and not set(ITS_OWN) & set(parents(event)):
            found[name] += 1
    return dict(found)


def parents(event: Any) -> list[str]:
    """The operations that it is part of."""
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event.name)
    return found


def step_reads(parallel: ParallelConfig, cfg: OptimConfig = STAGE2, precision: str = "fp32") -> dict[str, int]:
    """Of a second step, whose rows have images, none, and no label."""
    model_cfg = tiny.tiny_model()
    groups.lay_out(parallel, seed=0)
    chunks = build_model(model_cfg, parallel, precision, seed=0)
    optim.freeze(chunks, optim.part_rates(cfg))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(cfg, parallel, precision, model)
    step.prepare_model(model)
    optim.set_rates(optimizer, cfg, 1, 10)
    rows = [*tiny.rows(3), tiny.row([(t := tiny.sample(9, 12, 0))[:1] + (torch.full((12,), -100),) + t[2:]], 48)]
    batches = [model_batch(row, model_cfg, image_token=tiny.IMAGE, device=device.device()) for row in rows]
    step.train_step(model, optimizer, batches, clip=1.0)
    return reads(lambda: step.train_step(model, optimizer, batches, clip=1.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_looks_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        assert step_reads(ParallelConfig(), precision=precision) == {"tolist": 1}
        if precision == "fp32":  # and one that is planted is seen
            real = vlm.place_images

            def looking(x: torch.Tensor, rows: torch.Tensor, *more: Any) -> torch.Tensor:
                rows.nonzero()
                return real(x, rows, *more) * float(rows[0, 0] < 1e9)

            monkeypatch.setattr(vlm, "place_images", looking)
            assert step_reads(ParallelConfig()) == {"tolist": 1, "_local_scalar_dense": 4, "nonzero": 4}
        groups.stop()


def on_ranks(layouts: list[dict[str, Any]]) -> list[dict[str, int]]:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        found = [step_reads(ParallelConfig(**layout)) for layout in layouts]
        groups.stop()
    return found


def test_so_does_every_layout() -> None:
    layouts = [dict(tensor=2, sequence=True), dict(pipeline=2), dict(pipeline=2, virtual=2), dict()]
    for rank in run_ranks(on_ranks, 2, layouts):
        assert rank == [{"tolist": 1}] * len(layouts)
