"""How the work is spread over processes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ParallelConfig:
    """The layout (`vlm_nemo.runtime.groups`). What is left of the world size is data parallel."""

    tensor: int = 1
    """Ranks that share every layer (tensor parallelism)."""
    vision: int | None = None
    """Ranks that share every layer of the vision tower and projector: null = as many as tensor; 1 = each of them holds
    both whole, and the images of a row are shared out over them."""
    pipeline: int = 1
    """Stages that the language layers are cut into."""
    virtual: int = 1
    """Model chunks a pipeline stage (interleaved schedule); 1 = plain 1F1B."""
    layers: list[int] = field(default_factory=list)
    """Language layers of every stage in order (pipeline x virtual numbers; the first may be 0); empty = so that all
    stages take equally long, vision and head counted, by the first rows of the data."""
    context: int = 1
    """Ranks that share each row along its length, for rows too long for one rank: each does its own tokens, with keys
    and values of all. Cuts data.pack.capacity into twice as many chunks. Where a model answers, they are replicas."""
    sequence: bool = False
    """Sequence parallelism: shard norms and dropout over the tensor group; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel group (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data ranks in buckets while the backward pass still runs, not after it."""
    overlap_param_gather: bool = False
    """Collect updated weights from the data ranks in buckets while the next forward pass runs, not before it; needs
    distributed_optimizer and overlap_grad_reduce."""
    recompute: str = field(default="none", metadata={"choices": ("none", "selective", "full")})
    """What of the language layers is computed again in the backward pass instead of kept: selective = attention's core
    and the MLP, which hold more than half of it; full = whole layers."""
    recompute_vision: str = field(default="none", metadata={"choices": ("none", "full")})
    """The same of the vision tower's layers, where it trains; frozen it keeps nothing anyway."""
