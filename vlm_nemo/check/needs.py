"""What one rank of a layout needs for a step, found by running the step itself on shapes (world.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlm_nemo.check.meter import Meter
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


@dataclass(frozen=True, kw_only=True)
class StageNeeds:
    """Of the first tensor and context rank of a pipeline stage. Sizes are bytes."""

    stage: int
    parameters: dict[str, int]
    """Part -> numbers that this rank holds."""
    trained: int
    """Of these, the ones that learn."""
    weights: int
    gradients: int
    """megatron's fp32 buffers, padding included."""
    optimizer: int
    """AdamW's moments, and fp32 copies of half-precision weights; this rank's share of data x context."""
    activations: int
    """The rest of what is alive at the worst moment of the schedule."""
    forward_flops: float
    """Of one micro-batch, matrix products and attention as they are computed: padding included."""
    backward_flops: float
    sent: dict[str, int] = field(default_factory=dict)
    """Collective -> bytes that this rank hands in during a step: those of the tensor group, between stages, and of the
    context group (meter.py)."""
    data_sent: int = 0
    """The same over data x context ranks: fp32 gradients reduced, weights gathered."""

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
    per_stage = world // parallel.pipeline  # megatron numbers tensor, then context, data, pipeline ranks
    with pretend(parallel, world=world, rank=stage * per_stage) as ranks:
        kinds = range(parallel.virtual) if parallel.virtual > 1 else [None]
        chunks = [VLM(cfg, parallel, device.PRECISIONS[precision], vp_stage=kind) for kind in kinds]
        optim.freeze(chunks, optim.part_rates(optimizer))
        # What overlaps needs no more memory, and cannot end where nothing finishes the step
        model = optim.wrap(chunks, replace(parallel, overlap_grad_reduce=False, overlap_param_gather=False))
        for chunk in model:  # what finishes a step's gradients sums over the data group: counted below
            chunk.config.finalize_model_grads_func = chunk.config.grad_scale_func = None
        parameters: dict[str, int] = {}
        trained = 0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                part = name.split(".", 1)[0]
                parameters[part] = parameters.get(part, 0) + parameter.numel()
                trained += parameter.numel() if parameter.requires_grad else 0
        batch = make(shapes_only)
        batches = [batch] * _enough(parallel, micro)
        with FlopCounterMode(display=False) as forward:
            run_schedule(model, batches, forward_only=True)
        meter = Meter({"context": groups.context_group()} if parallel.context > 1 else None)
        weights = meter.include([[p.data for p in chunk.parameters()] for chunk in chunks])
        gradients = meter.include([[buffer.grad_data for buffer in chunk.buffers] for chunk in model])
        meter.restart()
        with meter:
            run_schedule(model, batches)
        with FlopCounterMode(display=False) as both:
            run_schedule(model, batches)
        holders = ranks.data * ranks.context  # of the same parameters, each with gradients of other tokens
        share = holders if parallel.distributed_optimizer else 1
        state = trained * (ADAM + (MASTER if precision == "bf16" else 0)) // share
        shared = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad and is_shared(p))
    total = both.get_total_flops() / len(batches)
    first = forward.get_total_flops() / len(batches)
    scale = micro / len(batches)
    data_sent = 0 if holders == 1 else gradients + (trained * (2 if precision == "bf16" else 4) // share)
    sent = {name: round(size * scale) for name, size in meter.sent.items()}
    if shared:  # their fp32 gradients are averaged over the tensor group, where a step's gradients are finished
        sent["allreduce"] = sent.get("allreduce", 0) + 4 * shared
    return StageNeeds(
        stage=stage,
        parameters=parameters,
        trained=trained,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=meter.peak - weights - gradients,
        forward_flops=first,
        backward_flops=total - first,
        sent=sent,
        data_sent=data_sent,
    )


def _enough(parallel: ParallelConfig, micro: int) -> int:
    """Micro-batches after which a stage holds no more than before: the interleaved schedule warms up twice as long,
    and takes multiples of the stages only."""
    return min(micro, parallel.pipeline * (2 if parallel.virtual > 1 else 1))
