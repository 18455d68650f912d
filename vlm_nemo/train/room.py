"""Whether the machines have memory for the copies that are written in the background."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from dataclasses import dataclass

import torch.distributed as dist

from vlm_nemo.runtime import exchange, host

SHARE = 0.5
"""Of a machine's free memory, at most; the data's threads and the page cache live there, too."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the copies of a save take. Sizes are bytes."""

    rank: int
    """Of this process."""
    machine: int
    """Of all processes of the machine that has least room for them."""
    free: int | None
    """On that machine; None where it does not say."""

    @property
    def enough(self) -> bool:
        return self.free is None or self.machine <= SHARE * self.free

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {self.free / 1e9:,.1f} GB free"
        return f"{self.rank / 1e9:,.2f} GB of host memory a rank, {self.machine / 1e9:,.2f} GB{free} on a machine"


def room_for(size: int) -> Room:
    """Of the job's machines, the one with the least room; the same on every rank, but for `rank`. Collective.

    size: bytes of this rank's copies.
    """
    mine = json.dumps([socket.gethostname(), size, host.available_bytes()]).encode()
    told = exchange.gather_bytes(mine, dist.group.WORLD)
    needed: dict[str, int] = defaultdict(int)
    free: dict[str, int | None] = {}
    for name, need, left in map(json.loads, told):
        needed[name] += need
        known = free.get(name)
        free[name] = left if known is None else known if left is None else min(known, left)
    tightest = max(needed, key=lambda name: needed[name] / max(1, left) if (left := free[name]) is not None else 0.0)
    return Room(rank=size, machine=needed[tightest], free=free[tightest])
