"""megatron-core's transformer configured for our parts: one config builder and one layer spec, used by all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.attention import CoreAttention
from vlm_nemo.model.kernels import PLAIN, Kernels
from vlm_nemo.model.mlp import SwiGLU, fits
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.self_attention import IDLE, RotarySelfAttention
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.fusion import fused
from vlm_nemo.types import UserError


@fused
def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def transformer_config(
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    pipelined: bool,
    recompute: str = "none",
    kernels: Kernels = PLAIN,
    extra: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> TransformerConfig:
    """megatron's config with our decisions filled in.

    pipelined: split over pipeline stages (the language model) and its rows over context ranks; the vision tower and
    projector live whole on the first stage and keep their sequence unsplit. recompute: none, selective or full. extra:
    a user's further fields (`model.megatron`), checked by name.

    Raises UserError for an extra field that megatron-core does not have, that another key decides, or that would
    change nothing.
    """
    decided: dict[str, Any] = dict(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline if pipelined else 1,
        virtual_pipeline_model_parallel_size=parallel.virtual if pipelined and parallel.virtual > 1 else None,
        # Our batches come cut (context.py): megatron only divides the length of what stages send to each other by it
        context_parallel_size=parallel.context if pipelined else 1,
        sequence_parallel=parallel.sequence and pipelined,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        # Weights are set by init.py as a function of (seed, name), so that every layout starts from the same ones.
        perform_initialization=False,
        use_cpu_initialization=not device.on_cuda(),
        # The mean over micro-batches of their mean losses weighs tokens unequally; only the token sum is invariant.
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # These fusions need apex or TransformerEngine (kernels.py), or gain nothing on CPU.
        gradient_accumulation_fusion=kernels.fused_gradients,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Batched p2p with interleaved stages is silently wrong at pipeline = 2.
        overlap_p2p_comm=pipelined and parallel.virtual > 1,
        batch_p2p_comm=not (pipelined and parallel.virtual > 1),
        # Else the host waits for the device after every send, for the sake of torch before 1.13
        batch_p2p_sync=False,
        # The interleaved schedule frees an output while its send is in flight. NCCL's stream keeps the memory; gloo
        # would send what was written there next.
        deallocate_pipeline_outputs=pipelined and (parallel.virtual == 1 or device.on_cuda()),
        **sizes,
    )
    if recompute == "full":
        decided.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recompute == "selective":
        decided.update(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])
    decided["use_te_activation_func"] = fits(decided, extra or {})  # it means: the MLP's activation is a module
    known = {f.name for f in fields(TransformerConfig)}
    for name in extra or {}:
        if name not in known:
            raise UserError(f"model.megatron.{name} is not a field of megatron-core's TransformerConfig")
        if name in decided:
            raise UserError(f"model.megatron.{name} is decided by another key of the recipe; set that one instead")
        if name in IDLE:
            raise UserError(f"model.megatron.{name} changes megatron-core's own attention, which is not used here")
    return TransformerConfig(**decided, **(extra or {}))


def block_spec(
    num_layers: int,
    mask: AttnMaskType,
    *,
    module: type[TransformerLayer] = TransformerLayer,
    params: Mapping[str, Any] | None = None,
    head_norm: bool = False,
    kernels: Kernels = PLAIN,
) -> TransformerBlockSubmodules:
    """Pre-norm layers: norm, attention, residual, norm, MLP, residual. num_layers is this stage's own number.

    module, params: a layer of another kind, with these arguments more. head_norm: norms of every head's queries and
    keys.
    """
    norm = Norm if head_norm else None
    layer = ModuleSpec(
        module=module,
        params=dict(params or {}),
        submodules=TransformerLayerSubmodules(
            input_layernorm=kernels.norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=kernels.column,
                    core_attention=CoreAttention,
                    linear_proj=kernels.row,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=kernels.norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_spec(kernels)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=kernels.norm)


def mlp_spec(kernels: Kernels = PLAIN) -> MLPSubmodules:
    """Column-parallel then row-parallel: one all-reduce over the tensor group."""
    return MLPSubmodules(linear_fc1=kernels.column, linear_fc2=kernels.row, activation_func=SwiGLU)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over the tower's tensor group of what each rank has, where each goes on with its own use of it: every
    rank's use then sends gradient to every rank's part."""
    group = groups.vision_group()
    summed = reduce_from_tensor_model_parallel_region(x.contiguous(), group)
    return copy_to_tensor_model_parallel_region(summed, group)
