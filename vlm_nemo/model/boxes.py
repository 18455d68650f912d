"""Where each local parameter lies in the whole model: the one description that init, checkpoints and conversion share.

A parameter on a rank is one box of a global tensor, or several stacked along its first axis: under tensor
parallelism a SwiGLU's fc1 holds [its rows of gate; its rows of up], two boxes of one global [2F, D] tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular piece of the global tensor `key`."""

    key: str
    """The parameter's name in the whole model, layers numbered globally: no trace of any layout."""
    global_shape: Shape
    offset: Shape
    shape: Shape

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """A parameter of this process and the boxes it holds, stacked along axis 0."""

    name: str
    parameter: nn.Parameter
    boxes: tuple[Box, ...]

    @property
    def part(self) -> str:
        """vision | projector | language"""
        return self.name.split(".", 1)[0]

    def pieces(self, local: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """Each box with its view of a tensor shaped like the parameter."""
        row = 0
        for box in self.boxes:
            rows = box.shape[0] if box.shape else 1
            yield box, local[row : row + rows] if box.shape else local
            row += rows


def mark_shared(module: nn.Module) -> None:
    """Its parameters are whole on every tensor rank, which sees other images on each (share.py): megatron averages
    their gradients over the tensor group."""
    for parameter in module.parameters():
        parameter.average_gradients_across_tp_domain = True


def is_shared(parameter: nn.Parameter) -> bool:
    """Whether `mark_shared` marked it."""
    return getattr(parameter, "average_gradients_across_tp_domain", False)


def split_rows(key: str, parameter: nn.Parameter, offset: int, total: int) -> ShardedTensor:
    """For a module's `sharded_state_dict`: the parameter is rows offset, offset + 1, … of a tensor of `total` rows, the
    others being on other tensor ranks, which need not have as many."""
    rest = tuple(parameter.shape[1:])
    return ShardedTensor(
        key=key,
        data=parameter,
        dtype=parameter.dtype,
        local_shape=tuple(parameter.shape),
        global_shape=(total, *rest),
        global_offset=(offset, *(0 for _ in rest)),
        axis_fragmentations=None,
        replica_id=(0, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
    )


def local_parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    """Every parameter of this process's model chunks (unwrapped VLMs), in their order."""
    found: list[LocalParameter] = []
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        by_address = {}
        for entry in sharded.values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None:
                by_address[entry.data.data_ptr()] = entry
        for name, parameter in chunk.named_parameters():
            entry = by_address.get(parameter.data_ptr())
            assert entry is not None, f"{name} is in no sharded state dict"
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            boxes = tuple(
                Box(
                    key=p.key,
                    global_shape=tuple(p.global_shape),
                    offset=tuple(p.global_offset),
                    shape=tuple(p.local_shape),
                )
                for p in parts
            )
            found.append(LocalParameter(name=name, parameter=parameter, boxes=boxes))
    return found
