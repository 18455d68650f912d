"""The memory of the machine: how much of it is free, and copies of device tensors in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm_nemo.runtime import device

BLOCK = 2**28
"""Bytes that are asked for at once: pinned memory comes in powers of two."""
ALIGNED = 64


def available_bytes() -> int | None:
    """What processes here may still take, by the machine and by the container's limit; None where nobody says."""
    found = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        found.append(int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)[0]) * 1024)
    except (OSError, IndexError):
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        cached = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        found.append(limit - int((group / "memory.current").read_text()) + sum(map(int, cached)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return max(0, min(found)) if found else None


class HostCopies:
    """Copies of tensors as they are at one moment. The memory (pinned where there is a GPU) is taken by the first and
    used again by the next, so ask for new copies only when the last ones are done with."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def bytes(self) -> int:
        """What it has taken so far."""
        return sum(block.numel() for block in self._blocks)

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One copy each, of the same shapes and types, complete when this returns: one wait for the device in all."""
        left = sum(_rounded(tensor) for tensor in tensors)
        copies, block, used = [], 0, 0
        for tensor in tensors:
            while block < len(self._blocks) and used + tensor.nbytes > self._blocks[block].numel():
                block, used = block + 1, 0
            if block == len(self._blocks):
                size = max(_rounded(tensor), min(BLOCK, left))
                self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=device.on_cuda()))
            copy = self._blocks[block][used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor.detach(), non_blocking=True))
            used += _rounded(tensor)
            left -= _rounded(tensor)
        device.synchronize()
        return copies


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED
