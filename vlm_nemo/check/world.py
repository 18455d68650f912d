"""A cluster that is not there: this process as any rank of any layout, with tensors that have shapes and no memory.

torch.distributed's fake backend answers every collective at once; FakeTensorMode runs every operation on shapes. So the
very modules, schedules and optimizers that train also tell what they would need, for 7B parameters on a laptop and for
a thousand ranks in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks


@contextlib.contextmanager
def pretend(parallel: ParallelConfig, *, world: int, rank: int, as_gpu: bool = False) -> Iterator[Ranks]:
    """Be `rank` of `world`. Tensors made inside have no memory; those from outside are taken by their shapes.

    as_gpu: RMSNorms keep what a GPU's kernel keeps for its backward pass, not what a CPU does.

    Must run where no process group is initialised, and never inside a job: it uses torch.distributed's default group.
    """
    assert not dist.is_initialized(), "a rehearsal runs in a process of its own"
    with device.adapter(pretend=True):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            ranks = groups.lay_out(parallel, seed=0)
            # Real numbers (a rotary table made at import) may meet pretended ones
            with FakeTensorMode(allow_non_fake_inputs=True), _GpuNorms() if as_gpu else contextlib.nullcontext():
                yield ranks
        finally:
            groups.stop()


def shapes_only(tensor: Tensor) -> Tensor:
    """The tensor without its memory; inside `pretend`. Where samples end (int32) is kept: their attention is counted by
    it (arithmetic.py)."""
    return tensor if tensor.dtype is torch.int32 else torch.empty_like(tensor, device="cpu")


class _GpuNorms(TorchFunctionMode):
    """CUDA has one operation for an RMSNorm; a CPU takes five, which keep two copies in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return _GpuNorm.apply(args[0], kwargs["weight"])
        return func(*args, **(kwargs or {}))


class _GpuNorm(torch.autograd.Function):
    """It keeps its input and 1/rms of every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        return torch.empty_like(x) if to_x else None, torch.empty_like(weight) if to_weight else None
