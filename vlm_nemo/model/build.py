"""Build a model for this process: its pipeline stage (as one chunk or several), on its device, weights set."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from vlm_nemo.model.boxes import LocalParameter, local_parameters
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.init import initialise
from vlm_nemo.model.vlm import PARTS, VLM
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig


def build_model(
    cfg: ModelConfig, parallel: ParallelConfig, precision: str, seed: int, fresh: Collection[str] = PARTS
) -> list[VLM]:
    """This process's model chunks: one, or `parallel.virtual` under the interleaved schedule.

    fresh: the parts whose weights are drawn from `seed`; those of the others are undefined until they are loaded.
    Must run inside `device.adapter()` after the groups are laid out.
    """
    dtype = device.PRECISIONS[precision]
    stages = range(parallel.virtual) if parallel.virtual > 1 else [None]
    chunks = [VLM(cfg, parallel, dtype, vp_stage=stage).to(device.device()) for stage in stages]
    parameters = local_parameters(chunks)
    mark_split(parameters)
    initialise((p for p in parameters if p.part in fresh), cfg, seed)
    return chunks


def mark_split(parameters: Iterable[LocalParameter]) -> None:
    """Tell megatron which parameters the tensor group splits, so that the gradient norm counts the others once.

    megatron does this inside its own initialisation, which init.py replaces. Experts that are spread over ranks are
    others on every rank of the group that their norm is summed over.
    """
    for local in parameters:
        box = local.boxes[0]
        held = sum(b.numel for b in local.boxes)
        split = held != int(torch.Size(box.global_shape).numel())
        spread = not getattr(local.parameter, "allreduce", True)  # megatron's mark of such experts
        local.parameter.tensor_model_parallel = split or spread
