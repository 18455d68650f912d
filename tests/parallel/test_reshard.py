"""Saved at any layout, loaded at any other, optimizer included: the next losses are those of the run that went on.

Every rank writes its share: each element once, balanced by bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.trained import trained
from tests.ranks import run_ranks
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import checkpoint

Layout = dict[str, Any]

TP2_PP2_SP = dict(tensor=2, pipeline=2, sequence=True)
TP2_DP2 = dict(tensor=2, distributed_optimizer=False)
DP_ALL = dict(distributed_optimizer=True)
PLAIN = dict(distributed_optimizer=False)
BEFORE, AFTER = 2, 2
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one": (1, PLAIN),
    "tp4": (4, dict(tensor=4, distributed_optimizer=False)),
    "pp4": (4, dict(pipeline=4, distributed_optimizer=False)),
    "dp4": (4, PLAIN),
    "dp4_distopt": (4, DP_ALL),
    "tp2_pp2": (4, TP2_PP2_SP),
    "pp2_vpp2_dp2": (4, dict(pipeline=2, virtual=2, distributed_optimizer=True)),
    "cp2_dp2_distopt": (4, dict(context=2, distributed_optimizer=True)),
    "cp2_pp2": (4, dict(context=2, pipeline=2, distributed_optimizer=False)),
    "dp4_overlap": (
        4,
        dict(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    "tp4_vision1": (4, dict(tensor=4, vision=1, distributed_optimizer=False)),
    "tp2_dp2_vision1": (4, dict(tensor=2, vision=1, distributed_optimizer=True)),
    "pp2_dp2_uneven": (4, dict(pipeline=2, layers=[1, 3], distributed_optimizer=True)),
    "tp2_pp2_dp2": (8, dict(tensor=2, pipeline=2, distributed_optimizer=True)),
    "tp2_pp2_dp2_whole": (8, dict(tensor=2, pipeline=2, sequence=True, distributed_optimizer=False)),
}


def write(layout: Layout, folder: str) -> list[float]:
    """Train, save in the background, go on: the losses after the save."""
    with device.adapter():
        made = trained(ParallelConfig(**layout))
        made.steps(BEFORE)
        saver = made.saver(Path(folder))
        made.save(saver)
        losses = made.steps(AFTER)
        saver.wait()
        saver.close()
    return losses


def read(layout: Layout, step_folder: str) -> list[float]:
    """Go on from a checkpoint: the losses."""
    with device.adapter():
        made = trained(ParallelConfig(**layout), Path(step_folder))
        assert made.done == BEFORE
        return made.steps(AFTER)


def several(tasks: list[tuple[str, Layout, str]]) -> list[list[float]]:
    """Writes and reads one after the other in one set of ranks."""
    return [write(layout, folder) if kind == "write" else read(layout, folder) for kind, layout, folder in tasks]


def test_the_next_losses_are_those_of_the_run_that_went_on(tmp_path: Path) -> None:
    """A covering handful; the whole matrix below takes minutes."""
    pairs = [
        ("tp2_pp2", ["dp4_overlap", "tp4_vision1"]),
        ("dp4_overlap", ["pp4", "cp2_pp2"]),
        ("dp4", ["tp2_pp2"]),
        ("tp2_dp2_vision1", ["pp2_dp2_uneven"]),
        ("cp2_dp2_distopt", ["pp2_vpp2_dp2"]),
    ]
    tasks = []
    for written, readers in pairs:
        tasks.append(("write", LAYOUTS[written][1], str(tmp_path / written)))
        tasks += [("read", LAYOUTS[reader][1], str(tmp_path / written / "step_000002")) for reader in readers]
    found = run_ranks(several, 4, tasks)
    expected: list[float] = []
    for task, losses in zip(tasks, found[0], strict=True):
        if task[0] == "write":
            expected = losses
            assert len(set(losses)) == AFTER, "equal constants would prove nothing"
        assert losses == pytest.approx(expected, rel=1e-6), task
    assert all(other == found[0] for other in found)
    for written, _ in pairs:
        shared_out(tmp_path / written / "step_000002", world=4)


def shared_out(step_folder: Path, world: int) -> None:
    """All ranks wrote, no element twice; where they hold the same, about as much each."""
    assert checkpoint.verify(step_folder) == []
    sizes = [0] * world
    for path in step_folder.rglob("*_0*.safetensors"):
        sizes[int(path.stem.rpartition("_")[2])] += path.stat().st_size
    assert min(sizes) > 0
    if "dp4" in str(step_folder):
        assert max(sizes) < 1.15 * sum(sizes) / world, sizes
    reader = checkpoint.tensors.Reader(step_folder / "weights")
    held = sum(path.stat().st_size for path in (step_folder / "weights").glob("*"))
    shapes = reader.shapes("weight").values()
    needed = 4 * sum(int(checkpoint.torch.Size(shape).numel()) for shape in shapes)
    assert held < 1.05 * needed + 300 * len(reader.shapes("weight")) + 8192 * world


@pytest.mark.slow
@pytest.mark.parametrize("written", LAYOUTS)
def test_every_layout_to_every_other(tmp_path: Path, written: str) -> None:
    world, layout = LAYOUTS[written]
    (expected, *_) = run_ranks(write, world, layout, str(tmp_path / "run"), timeout=1200)
    step_folder = str(tmp_path / "run" / "step_000002")
    for size in (1, 4, 8):
        names = [name for name, (ranks, _) in LAYOUTS.items() if ranks == size]
        tasks = [("read", LAYOUTS[name][1], step_folder) for name in names]
        for name, losses in zip(names, run_ranks(several, size, tasks, timeout=1200)[0], strict=True):
            assert losses == pytest.approx(expected, rel=1e-6), (written, name)
