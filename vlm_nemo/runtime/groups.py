"""The one place that names ranks and process groups: start them, ask where this process stands, end them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import vision_alone
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""Of a collective."""
SAY_SECONDS = 60.0
LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands. tensor x context x pipeline ranks are a replica; times `data`, the world."""

    world: int
    rank: int
    tensor: int
    tensor_rank: int
    context: int
    context_rank: int
    pipeline: int
    pipeline_rank: int
    data: int
    data_rank: int
    expert: int = 1
    """Ranks that the experts of a layer are spread over; they need not see the same data."""
    expert_rank: int = 0

    @property
    def first_stage(self) -> bool:
        """Holds the first pipeline stage (vision, projector, embedding)."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Holds the last pipeline stage (head, loss)."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def reader(self) -> bool:
        """The one rank of its replica that reads."""
        return self.first_stage and self.tensor_rank == 0 and self.context_rank == 0

    @property
    def sizes(self) -> dict[str, int]:
        """The layout in numbers: world, tensor, pipeline, data and whatever else there is."""
        names = [entry.name for entry in fields(self)]
        return {name: int(getattr(self, name)) for name in names if name == "world" or f"{name}_rank" in names}

    @property
    def main(self) -> bool:
        """The one process that prints and writes what there is once."""
        return self.rank == 0


def start(parallel: ParallelConfig, seed: int) -> Ranks:
    """Join the job that the environment describes (torchrun's variables; alone without them) and lay out the groups.

    Must run inside `device.adapter()`.
    """
    global _store
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.on_cuda():
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"local rank {local} finds only {there} GPUs on this machine; start {there} ranks a node")
        torch.cuda.set_device(local)
        device.exact_fp32()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.on_cuda() else "gloo"
        if world == 1:
            _store = dist.HashStore()
            dist.init_process_group(backend, store=_store, rank=0, world_size=1)
        else:
            # What init_process_group does by itself with these variables, but that would keep the store to itself
            _store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
            own = dist.PrefixStore("groups", _store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)
    return lay_out(parallel, seed)


def lay_out(parallel: ParallelConfig, seed: int) -> Ranks:
    """Build megatron's groups over an initialised torch.distributed, replacing an earlier layout."""
    from megatron.core import parallel_state

    global _alone
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    _alone = None
    if vision_alone(parallel):
        _alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    device.seed_everything(seed)
    return Ranks(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel.context,
        context_rank=parallel_state.get_context_parallel_rank(),
        pipeline=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert=parallel.expert,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
    )


def stop() -> None:
    """Leave the job."""
    from megatron.core import parallel_state

    global _alone, _store
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _alone = _store = None


def board() -> dist.Store:
    """Where a rank leaves words for the others to find when they look: no collective, so any thread may use it."""
    assert _store is not None, "not by start()"
    return dist.PrefixStore("board", _store)


def wait_for_all(failed: bool = False) -> None:
    """Wait until every rank has come here, however long that takes, or one has failed.

    A collective gives up after TIMEOUT; here ranks look at the job's store instead.
    """
    if dist.get_world_size() == 1:
        return
    store = _store
    assert store is not None, "several processes, and not by start()"
    key = f"vlm_nemo/wait/{next(_waits)}"
    store.add(f"{key}/failed", int(failed))
    store.add(f"{key}/here", 1)
    started = said = time.monotonic()
    while not failed and not store.add(f"{key}/failed", 0):
        left = dist.get_world_size() - store.add(f"{key}/here", 0)
        if not left:
            return
        if time.monotonic() - said > SAY_SECONDS and dist.get_rank() < 2:  # rank 0 may be one of those that work
            said = time.monotonic()
            log.warning("waiting for %d ranks that open their data, %.0f s so far", left, said - started)
        time.sleep(LOOK_SECONDS)


_store: dist.Store | None = None
"""Of the job that `start` joined."""
_alone: dist.ProcessGroup | None = None
"""This rank, where the vision tower is whole on every rank."""
_waits = itertools.count()
"""Every rank waits as often as every other."""


def sum_over(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum a few numbers over a group (the world by default); one collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device.device())
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


def max_over(values: list[float]) -> list[float]:
    """The largest of each number over the world; one collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device.device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def sum_and_max_over(sums: list[float], most: list[float]) -> tuple[list[float], list[float]]:
    """Both over the world, each number of its own list: two collectives, and one look at the device."""
    tensor = torch.tensor([*sums, *most], dtype=torch.float64, device=device.device())
    dist.all_reduce(tensor[: len(sums)])
    dist.all_reduce(tensor[len(sums) :], op=dist.ReduceOp.MAX)
    found = tensor.tolist()
    return found[: len(sums)], found[len(sums) :]


def data_group() -> dist.ProcessGroup:
    """Ranks that hold the same part of the model and see different rows: one of each replica."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def context_group() -> dist.ProcessGroup:
    """Ranks that hold the same part of the model and share its rows along their length."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def last_stage_rank() -> int:
    """Global rank of the last pipeline stage that works with this rank, the one that knows the loss."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_last_rank()


def pipeline_group() -> dist.ProcessGroup:
    """Ranks that hold the successive stages of one replica."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


def everyone() -> dist.ProcessGroup:
    """All ranks of the job."""
    return dist.group.WORLD


def tensor_group() -> dist.ProcessGroup:
    """Ranks that share every layer of this stage; the first of them has tensor rank 0."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def experts_group() -> dist.ProcessGroup:
    """Ranks that hand one another their tokens for the experts of a layer."""
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_and_model_parallel_group()


def vision_group() -> dist.ProcessGroup:
    """Ranks that share every layer of the vision tower and projector: the tensor group, or this rank alone."""
    return tensor_group() if _alone is None else _alone


def image_group() -> dist.ProcessGroup:
    """Ranks that see the same row (tensor x context): they share out its images where each holds the whole tower."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_and_context_parallel_group()


def replica_group() -> dist.ProcessGroup:
    """Ranks that hold one copy of the model (tensor x pipeline); the first has tensor rank 0 of the first stage.

    A replica of `context` > 1 is that many of them.
    """
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group()
