"""How the work is spread over processes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ParallelConfig:
    """The layout (`vlm_nemo.runtime.groups`). What is left of the world size is data parallel."""

    tensor: int = 1
    """Ranks that share every layer (tensor parallelism)."""
    pipeline: int = 1
    """Stages that the language layers are cut into."""
    virtual: int = 1
    """Model chunks a pipeline stage (interleaved schedule); 1 = plain 1F1B."""
    context: int = 1
    """Ranks that share each row along its length, for rows too long for one rank: each does its own tokens, with keys
    and values of all. Cuts data.pack.capacity into twice as many chunks. Where a model answers, they are replicas."""
    sequence: bool = False
    """Sequence parallelism: shard norms and dropout over the tensor group; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel group (ZeRO-1)."""
    recompute: str = field(default="none", metadata={"choices": ("none", "full")})
    """full: recompute the activations of every language layer in the backward pass."""
