"""Optimizer: which parts learn and how fast, AdamW over megatron's DDP buffers, one clipped update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, ParamPredicate
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from vlm_nemo.model.vlm import PARTS, VLM
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import UserError


def part_rates(cfg: OptimConfig) -> dict[str, float | None]:
    """Peak learning rate of every part; None = frozen. Raises UserError if nothing would learn."""
    rates = dict(zip(PARTS, (cfg.vision_lr, cfg.projector_lr, cfg.language_lr), strict=True))
    if all(rate is None for rate in rates.values()):
        raise UserError("every part is frozen; give optim.vision_lr, optim.projector_lr or optim.language_lr a value")
    return rates


def learns(cfg: OptimConfig) -> dict[str, bool]:
    """Part -> whether it is trained."""
    return {part: rate is not None for part, rate in part_rates(cfg).items()}


def freeze(chunks: Sequence[VLM], rates: dict[str, float | None]) -> None:
    """Frozen parts make no gradients. Call before `wrap`: megatron's buffers hold trainable parameters only."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(rates[name.split(".", 1)[0]] is not None)


def wrap(chunks: Sequence[VLM], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """megatron's data parallelism: fp32 gradient buffers, summed (not averaged) over ranks."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    model = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    if parallel.overlap_param_gather:
        for wrapped, chunk in zip(model, chunks, strict=True):
            if chunk.pre_process:
                chunk.projector.register_forward_pre_hook(_wait_for_all(wrapped, chunk.projector))
                if chunk.vision.tiling is not None:
                    chunk.vision.register_forward_pre_hook(_wait_for_all(wrapped, chunk.vision.tiling))
    return model


def _wait_for_all(wrapped: DistributedDataParallel, inside: nn.Module) -> Callable[..., None]:
    """megatron waits for a module's own weights when it is called. A projector multiplies by its children's too, and
    a tower adds vectors of its tiles, which are never called: the weights of all that is `inside` are waited for."""
    wait = wrapped._make_forward_pre_hook()

    def hook(*_: Any) -> None:
        for module in inside.modules():
            wait(module)

    return hook


def settle(model: Sequence[DistributedDataParallel]) -> None:
    """Have all weights in place, where parallel.overlap_param_gather leaves that to the next forward pass. All ranks
    together, before weights are read in any other way."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.param_gather_dispatched = False  # the forward pass gathers in its order, as it is used to


def build_optimizer(
    cfg: OptimConfig, parallel: ParallelConfig, precision: str, model: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW with a learning rate a part and no weight decay on norms and biases."""
    overrides: dict[ParamKey, Any] = {}
    for part, rate in part_rates(cfg).items():
        if rate is not None:
            overrides[ParamKey(name=f"module.{part}.*")] = {"max_lr": rate, "min_lr": rate * cfg.min_lr_ratio}
    one_dimensional = ParamPredicate(name="norm_or_bias", fn=lambda p: p.ndim == 1)
    overrides[ParamKey(predicate=one_dimensional)] = {"wd_mult": 0.0}
    # One AdamW everywhere: TransformerEngine's and apex's keep their step count elsewhere, so that a checkpoint would
    # resume with another bias correction where they are installed.
    mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    built = mcore_optimizer.get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.lr * cfg.min_lr_ratio,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            adam_eps=cfg.eps,
            clip_grad=cfg.clip_grad,
            bf16=precision == "bf16",
            params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        model,
        config_overrides=overrides,
        use_gloo_process_groups=False,
    )
    for inner in _inner(built):
        for group in inner.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return built


def set_rates(optimizer: MegatronOptimizer, cfg: OptimConfig, step: int, steps: int) -> float:
    """Set every group's rate for the update that ends `step` (1-based); return the factor of the peak."""
    factor = rate_factor(step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
    for inner in _inner(optimizer):
        for group in inner.optimizer.param_groups:
            group["lr"] = group["max_lr"] * factor
            group["weight_decay"] = cfg.weight_decay * group["wd_mult"]
    return factor


def rate_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Linear warm-up to 1 at step `warmup`, then a half cosine down to `floor` at `steps`. step counts from 1."""
    if step <= warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> Tensor:
    """[] fp32 on the device: the norm of the summed gradients, every parameter counted once; no look at it.

    megatron's own reads it back, and without apex or TransformerEngine every parameter's besides.
    """
    optimizer.prepare_grads()
    gradients: dict[dist.ProcessGroup, list[Tensor]] = {}
    for inner in optimizer.chained_optimizers:  # those that hold nothing take part in the sum too
        own = gradients.setdefault(inner.get_grad_stats_parallel_group(), [])
        own += inner.get_main_grads_for_grad_norm()
    total = torch.zeros((), device=device.device())
    for group, found in gradients.items():
        squares = torch.zeros((), device=device.device())
        if found:
            squares = torch.stack(torch._foreach_norm(found, 2)).square().sum()
        dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def update(optimizer: MegatronOptimizer, norm: float, clip: float) -> bool:
    """Clip the summed gradients, whose norm this is, and step; whether it did.

    A norm that is not finite is the same on every rank, so all of them leave the weights alone together.
    """
    if not math.isfinite(norm):
        return False
    scale = clip / (norm + 1e-6)
    if clip > 0 and scale < 1:
        parameters = [p for inner in _inner(optimizer) for p in inner.get_parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)
    optimizer.step_with_ready_grads()
    return True


@dataclass(frozen=True, kw_only=True)
class OptimizerSlice:
    """What this process's optimizer holds of one parameter: elements [start, stop) of it, flattened.

    Under the distributed optimizer that is this data rank's share; otherwise all of it.
    """

    parameter: nn.Parameter
    master: Tensor
    """The tensor that AdamW steps; an fp32 copy under bf16, the parameter's own memory under fp32."""
    start: int
    stop: int
    state: dict[str, Any]
    """AdamW's own: step, exp_avg, exp_avg_sq; empty before the first update."""
    sharded: bool
    """Whether other data ranks hold the other elements."""

    @property
    def has_copy(self) -> bool:
        return self.parameter.dtype != torch.float32


def optimizer_slices(optimizer: MegatronOptimizer) -> Iterator[OptimizerSlice]:
    """Everything that this process's optimizer holds, the same way for all of megatron's optimizers."""
    for inner in _inner(optimizer):
        state = inner.optimizer.state
        if isinstance(inner, DistributedOptimizer):
            pairs = zip(
                (*inner.model_float16_groups, *inner.model_fp32_groups),
                (*inner.shard_fp32_from_float16_groups, *inner.shard_fp32_groups),
                strict=True,
            )
            for models, masters in pairs:
                for model, master in zip(models, masters, strict=True):
                    span = inner._get_model_param_range_map(model)["param"]
                    yield OptimizerSlice(
                        parameter=model,
                        master=master,
                        start=span.start,
                        stop=span.end,
                        state=state[master],
                        sharded=True,
                    )
            continue
        if isinstance(inner, Float16OptimizerWithFloat16Params):
            held = [
                *zip(sum(inner.float16_groups, []), sum(inner.fp32_from_float16_groups, []), strict=True),
                *((p, p) for p in sum(inner.fp32_from_fp32_groups, [])),
            ]
        else:
            held = [(p, p) for group in inner.optimizer.param_groups for p in group["params"]]
        for model, master in held:
            yield OptimizerSlice(
                parameter=model, master=master, start=0, stop=model.numel(), state=state[master], sharded=False
            )


def refresh_masters(optimizer: MegatronOptimizer) -> None:
    """Copy the model's weights into the optimizer's fp32 copies: after weights were loaded without their optimizer."""
    optimizer.reload_model_params()


def _inner(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron chains one optimizer for dense and one for expert parameters; stubs hold nothing."""
    return [o for o in optimizer.chained_optimizers if not o.is_stub_optimizer and o.optimizer is not None]
