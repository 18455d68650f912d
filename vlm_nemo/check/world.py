"""A cluster that is not there: this process as any rank of any layout, with tensors that have shapes and no memory.

torch.distributed's fake backend answers every collective at once; FakeTensorMode runs every operation on shapes. So the
very modules, schedules and optimizers that train also tell what they would need, for 7B parameters on a laptop and for
a thousand ranks in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks


@contextlib.contextmanager
def pretend(parallel: ParallelConfig, *, world: int, rank: int) -> Iterator[Ranks]:
    """Be `rank` of `world`. Tensors made inside have no memory; those from outside are taken by their shapes.

    Must run where no process group is initialised, and never inside a job: it uses torch.distributed's default group.
    """
    assert not dist.is_initialized(), "a rehearsal runs in a process of its own"
    with device.adapter(pretend=True):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            ranks = groups.lay_out(parallel, seed=0)
            # Real numbers (a rotary table made at import) may meet pretended ones
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield ranks
        finally:
            groups.stop()


def shapes_only(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its memory; inside `pretend`."""
    return torch.empty_like(tensor, device="cpu")
