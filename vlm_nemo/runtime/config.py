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
    """Ranks that share one row along its length; this version supports 1."""
    expert: int = 1
    """Ranks that the experts of a layer are spread over, whole ones: of tensor x context x data. With 1 every expert is
    cut over the tensor ranks, as an MLP is."""
    sequence: bool = False
    """Sequence parallelism: shard norms and dropout over the tensor group; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel group (ZeRO-1)."""
    recompute: str = field(default="none", metadata={"choices": ("none", "full")})
    """full: recompute the activations of every language layer in the backward pass."""

    @property
    def expert_tensor(self) -> int:
        """Ranks that share one expert's matrices."""
        return 1 if self.expert > 1 else self.tensor
