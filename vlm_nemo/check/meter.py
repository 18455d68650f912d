"""What a piece of code needs: bytes alive at the worst moment, arithmetic, and bytes that a rank sends, by group; the
arithmetic of a pipeline's chunks apart. Works on real tensors too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from vlm_nemo.check.arithmetic import FORMULAS


class Meter(TorchDispatchMode):
    """Counts every storage that an operation makes, until it is freed; the arithmetic of matrix products and attention;
    and what this rank sends in collectives.

    Tensors that are there before are not counted until `include`d.
    """

    live: int
    """Bytes now."""
    peak: int
    """Most bytes since the start, or since `restart`."""
    flops: int
    """Since the start."""
    sent: Counter[str]
    """Bytes that this rank sends (see `ring`), by the collective's name: allreduce, allgather_base, send, …; those of a
    group that is counted apart with its word in front: context allgather_base. What it gets from another stage is under
    recv."""

    def __init__(self, apart: Mapping[str, dist.ProcessGroup] | None = None) -> None:
        """apart: groups by the word that they are counted under."""
        super().__init__()
        self._words = {group.group_name: f"{word} " for word, group in (apart or {}).items()}
        self.live = self.peak = self.flops = 0
        self.sent = Counter()
        self._known: set[int] = set()

    def include(self, tensors: Any) -> int:
        """Count tensors (any nest of them) that were there before; the bytes that are new."""
        before = self.live
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return self.live - before

    def restart(self) -> None:
        """The peak from now on."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._collective(func, args)
        elif (formula := FORMULAS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__.strip("_")
        found = [a for a in tree_leaves(args) if isinstance(a, torch.ScriptObject)]
        (group,) = [dist.ProcessGroup.unbox(a) for a in found if "ProcessGroup" in str(a._type())]
        # What is gathered, scattered or summed: the larger of output and input
        whole = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2])
        self.sent[self._words.get(group.group_name, "") + name] += ring(name, whole, group.size())


def ring(collective: str, whole: int, ranks: int) -> int:
    """Bytes that each of so many ranks sends so that all have, or have summed, `whole` bytes: every part goes around
    once, in a sum over all twice. NCCL's trees and NVLink's switches send no more.

    ("allgather_base", 800, 8) -> 700;  ("allreduce", 800, 8) -> 1400;  ("send", 800, …) -> 800
    """
    if collective in ("send", "recv"):
        return whole
    return (2 if collective.startswith("allreduce") else 1) * whole * (ranks - 1) // ranks


class ChunkFlops:
    """FLOPs of model chunks that a schedule runs in turn under a meter, each one's forward and backward apart.

    A backward begins where the gradient of the chunk's output arrives, and lasts until another pass begins.
    """

    forward: list[int]
    """Of every chunk, all its micro-batches together."""
    backward: list[int]

    def __init__(self, meter: Meter, chunks: Sequence[nn.Module]) -> None:
        self.forward, self.backward = [0] * len(chunks), [0] * len(chunks)
        self._meter, self._chunks = meter, chunks
        self._pass: tuple[list[int], int] | None = None
        self._before = 0

    def __enter__(self) -> ChunkFlops:
        self._hooks = [hook for chunk, module in enumerate(self._chunks) for hook in self._watched(chunk, module)]
        return self

    def __exit__(self, *error: Any) -> None:
        self._begin(None)
        for hook in self._hooks:
            hook.remove()

    def _watched(self, chunk: int, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        def ended(_module: nn.Module, _given: Any, output: Tensor) -> None:
            self._begin(None)
            if output.requires_grad:  # not where all that is before it is frozen
                output.register_hook(lambda _gradient: self._begin((self.backward, chunk)))

        began = module.register_forward_pre_hook(lambda *_: self._begin((self.forward, chunk)))
        return began, module.register_forward_hook(ended)

    def _begin(self, now: tuple[list[int], int] | None) -> None:
        total = self._meter.flops
        if self._pass:
            kind, chunk = self._pass
            kind[chunk] += total - self._before
        self._pass, self._before = now, total
