"""What one rank of a layout needs for a step, found by running the step itself on shapes (world.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from vlm_nemo.check.meter import ChunkFlops, Meter, ring
from vlm_nemo.check.world import pretend, shapes_only
from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.boxes import is_shared
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.step import run_schedule

MakeBatch = Callable[[Callable[[Tensor], Tensor]], ModelBatch]
"""A micro-batch whose every tensor went through the function given."""

ADAM = 8
"""Bytes a trained parameter: AdamW's two moments in fp32."""
MASTER = 4
"""Bytes a trained parameter in bf16: AdamW's fp32 copy."""
EXPERTS = "experts"
"""Word before the names of collectives that carry tokens to experts and back."""


@dataclass(frozen=True, kw_only=True)
class StageNeeds:
    """Of the first tensor and context rank of a pipeline stage. Sizes are bytes."""

    stage: int
    parameters: dict[str, int]
    """Part -> numbers that this rank holds."""
    trained: int
    """Of these, the ones that learn."""
    experts: int
    """Of the parameters, those of experts."""
    weights: int
    gradients: int
    """megatron's fp32 buffers, padding included."""
    optimizer: int
    """AdamW's moments, and fp32 copies of half-precision weights; this rank's share of data x context."""
    activations: int
    """The rest of what is alive at the worst moment of the schedule."""
    forward_flops: tuple[float, ...]
    """Of one micro-batch, chunk by chunk: matrix products and attention as they are computed, padding included."""
    backward_flops: tuple[float, ...]
    sent: dict[str, int] = field(default_factory=dict)
    """Collective -> bytes that this rank sends during a step: to the tensor group, between stages, to the context group
    and to the experts' (meter.py)."""
    data_sent: int = 0
    """The same to data x context ranks: fp32 gradients summed, and weights gathered where the optimizer is sharded."""

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_needs(
    cfg: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    optimizer: OptimConfig,
    make: MakeBatch,
    *,
    world: int,
    stage: int,
    micro: int,
) -> StageNeeds:
    """Run the schedule of `stage` with as many of its `micro` micro-batches as it ever holds at once."""
    cfg = replace(cfg, kernels="plain", fp8="none")  # TransformerEngine's layers do not run on shapes
    per_stage = world // parallel.pipeline  # megatron numbers tensor, then context, data, pipeline ranks
    with pretend(parallel, world=world, rank=stage * per_stage, as_gpu=precision == "bf16") as ranks:
        kinds = range(parallel.virtual) if parallel.virtual > 1 else [None]
        chunks = [VLM(cfg, parallel, device.PRECISIONS[precision], vp_stage=kind) for kind in kinds]
        optim.freeze(chunks, optim.part_rates(optimizer))
        # What overlaps needs no more memory, and cannot end where nothing finishes the step
        model = optim.wrap(chunks, replace(parallel, overlap_grad_reduce=False, overlap_param_gather=False))
        for chunk in model:  # what finishes a step's gradients sums over the data group: counted below
            chunk.config.finalize_model_grads_func = chunk.config.grad_scale_func = None
        parameters: dict[str, int] = {}
        learn = {"dense": 0, "spread": 0}
        experts = 0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                part = name.split(".", 1)[0]
                parameters[part] = parameters.get(part, 0) + parameter.numel()
                spread = not getattr(
                    parameter, "allreduce", True
                )  # megatron's mark of experts with a group of their own
                learn["spread" if spread else "dense"] += parameter.numel() if parameter.requires_grad else 0
                experts += parameter.numel() if ".experts." in name else 0
        batch = make(shapes_only)
        batches = [batch] * _enough(parallel, micro)
        apart = {"context": groups.context_group()} if parallel.context > 1 else {}
        if cfg.language.moe.experts is not None:
            apart[EXPERTS] = groups.experts_group()
        meter = Meter(apart)
        weights = meter.include([[p.data for p in chunk.parameters()] for chunk in chunks])
        gradients = meter.include([_gradients(chunk) for chunk in model])
        meter.restart()
        with meter, ChunkFlops(meter, chunks) as counted:
            run_schedule(model, batches)
        copies = {  # ranks that hold the same parameters, each with gradients of other tokens
            "dense": ranks.data * ranks.context,
            "spread": per_stage // (parallel.expert * parallel.expert_tensor),
        }
        split = {kind: count if parallel.distributed_optimizer else 1 for kind, count in copies.items()}
        state = sum(n * (ADAM + (MASTER if precision == "bf16" else 0)) // split[kind] for kind, n in learn.items())
        shared = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad and is_shared(p))
    scale, weight = micro / len(batches), device.PRECISIONS[precision].itemsize
    data_sent = sum(_to_data_ranks(n, copies[kind], weight, parallel) for kind, n in learn.items())
    sent = {name: round(size * scale) for name, size in meter.sent.items()}
    if shared:  # their fp32 gradients are averaged over the tensor group, where a step's gradients are finished
        sent["allreduce"] = sent.get("allreduce", 0) + ring("allreduce", 4 * shared, parallel.tensor)
    return StageNeeds(
        stage=stage,
        parameters=parameters,
        trained=sum(learn.values()),
        experts=experts,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=meter.peak - weights - gradients,
        forward_flops=tuple(flops / len(batches) for flops in counted.forward),
        backward_flops=tuple(flops / len(batches) for flops in counted.backward),
        sent=sent,
        data_sent=data_sent,
    )


def _to_data_ranks(trained: int, ranks: int, weight: int, parallel: ParallelConfig) -> int:
    """Bytes that each of so many ranks with the same parameters sends in a step. weight: bytes of one of them."""
    if not parallel.distributed_optimizer:
        return ring("allreduce", 4 * trained, ranks)
    return ring("reduce_scatter", 4 * trained, ranks) + ring("allgather", weight * trained, ranks)


def _gradients(chunk: DistributedDataParallel) -> list[Tensor]:
    """megatron's buffers: of what all data ranks hold, and of experts that are spread over them."""
    return [buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _enough(parallel: ParallelConfig, micro: int) -> int:
    """Micro-batches after which a stage holds in no pass more than before, of any chunk (`timeline.held`): the
    interleaved schedule warms up twice as long, and takes multiples of the stages only."""
    return min(micro, parallel.pipeline * (2 if parallel.virtual > 1 else 1))
