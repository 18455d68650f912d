"""What training copies to the host on CUDA, beside the step and for a save (tests/pretended.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.on_cuda import Case, alone, build
from tests.pretended import pretend
from vlm_nemo.model.layout import spec_of
from vlm_nemo.runtime.host import HostCopies
from vlm_nemo.train.vision_cache import Keeper


def kept(guard: Path) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    """A frozen tower's features go to the host's pinned memory beside the step; nothing waits for them there."""

    class Store:
        def add(self, key: bytes, part: Tensor) -> None:
            assert part.device.type == "cpu"
            found.append((key[0], *part.shape))

        def close(self) -> None:
            pass

    found: list[tuple[int, ...]] = []
    with pretend(guard) as gpu:
        run = build(gpu, Case())
        (batch, _), (row, _) = run.batches(), run.rows
        keeper = Keeper(Store(), spec_of(run.cfg))  # type: ignore[arg-type]
        keys = tuple(bytes([n]) for n in range(row.images.count))
        with gpu.running():
            run.step([keeper.keeping(batch, replace(row, image_keys=keys))])
        keeper.close()
        return found, dict(gpu.waits)


def test_features_are_kept_beside_the_step(guard: Path) -> None:
    rows, width = 16, 64
    assert alone(kept, guard) == ([(n, rows, width) for n in range(3)], {"tolist": 1})


def copied(guard: Path) -> dict[str, int]:
    with pretend(guard) as gpu, gpu.running():
        tensors = [torch.empty(5, 3, dtype=torch.bfloat16, device="cuda"), torch.empty(7, device="cuda")]
        copies = HostCopies().take(tensors)
        for tensor, copy in zip(tensors, copies, strict=True):
            assert copy.shape == tensor.shape and copy.dtype == tensor.dtype
            assert copy.device.type == "cpu" and gpu.is_pinned(copy)
        return dict(gpu.waits)


def test_a_save_waits_once_for_its_copies(guard: Path) -> None:
    assert alone(copied, guard) == {"synchronize": 1}
