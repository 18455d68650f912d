"""Bytes of any length from rank to rank, over the CPU's network."""

from __future__ import annotations

import torch
import torch.distributed as dist


def broadcast_bytes(data: bytes | None, group: dist.ProcessGroup) -> bytes:
    """What the group's first rank hands in, on all of them; the others hand in None."""
    source = dist.get_process_group_ranks(group)[0]
    size = torch.tensor([len(data) if data is not None else 0])
    dist.broadcast(size, source, group=group)
    content = _as_tensor(data) if data is not None else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, source, group=group)
    return data if data is not None else content.numpy().tobytes()


def send_bytes(data: bytes, rank: int) -> None:
    """To one rank (global number), which waits in `receive_bytes`."""
    dist.send(torch.tensor([len(data)]), rank)
    dist.send(_as_tensor(data), rank)


def receive_bytes(rank: int) -> bytes:
    """What `rank` (global number) sends."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, rank)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(content, rank)
    return content.numpy().tobytes()


def gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """What every rank of the group hands in, in their order, on all of them."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = max(int(size) for size in sizes)
    padded = _as_tensor(data.ljust(longest, b"\0"))
    found = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return [content.numpy().tobytes()[: int(size)] for content, size in zip(found, sizes, strict=True)]


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
