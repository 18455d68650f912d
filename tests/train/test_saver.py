"""Saves in the background: what was there when they began, one at a time, whole or not at all, errors on all ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import runs, warm
from tests.parallel.trained import ALL, STAGE1, STAGE2, Trained, trained
from tests.ranks import run_ranks
from vlm_nemo.runtime import device, groups, host
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.processes import RankFailed
from vlm_nemo.train import checkpoint, manifest, shares, tensors
from vlm_nemo.types import UserError


@pytest.fixture
def made() -> Iterator[Trained]:
    with device.adapter():
        one = trained(ParallelConfig(), optim_cfg=ALL)
        one.steps(1)
        yield one
        groups.stop()


def hashes(step_folder: Path) -> dict[str, str]:
    """Of the tensor files."""
    files = manifest.read_manifest(step_folder).files
    return {name: entry.sha256 for name, entry in files.items() if name.endswith(".safetensors")}


class Gate:
    """Holds up every write until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.writing, self.real = threading.Event(), threading.Event(), tensors.write
        patch.setattr(tensors, "write", self.write)

    def write(self, *given: Any) -> Any:
        self.writing.set()
        assert self.opened.wait(60)
        return self.real(*given)


def test_what_is_written_is_what_was_there(made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken while the writer has not begun change nothing of it: equal to a synchronous save to the bit."""
    truth = made.saver(tmp_path / "sync", asynchronous=False)
    made.save(truth)
    gate = Gate(monkeypatch)
    saver = made.saver(tmp_path / "async")
    path = made.save(saver)
    assert gate.writing.wait(60) and not path.exists()
    made.steps(1)
    gate.opened.set()
    saver.wait()
    assert hashes(path) == hashes(tmp_path / "sync" / path.name)
    assert set(hashes(path)) == {
        *(f"weights/{part}_00000.safetensors" for part in ("vision", "projector", "language")),
        "optimizer/rank_00000.safetensors",
    }
    made.save(saver)
    saver.wait()
    assert hashes(tmp_path / "async" / "step_000002") != hashes(path)
    saver.close()


def test_one_save_at_a_time_in_the_same_memory(made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = made.saver(tmp_path)
    first = made.save(saver)
    made.done = 2
    threading.Timer(0.3, gate.opened.set).start()
    began = time.monotonic()
    made.save(saver)  # waits for the first
    assert time.monotonic() - began > 0.25 and first.is_dir()
    saver.wait()
    taken, needed = saver._copies.bytes, saver.room.rank
    assert needed <= taken < needed + 64 * 1000, "copies of one save, whatever the number of saves"
    assert [line.split(":")[0] for line in saver.news()] == ["checkpoint step_000001", "checkpoint step_000002"]
    assert saver.news() == [] and checkpoint.find(tmp_path).name == "step_000002"
    saver.close()


def test_without_memory_for_the_copies_the_step_waits(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    saver = made.saver(tmp_path)
    assert not saver.asynchronous and "GB of host memory a rank" in str(saver.room)
    made.save(saver)
    assert checkpoint.verify(tmp_path / "step_000001") == [] and saver._copies.bytes == 0


def failing(code: int, *path: str) -> Callable[..., None]:
    """What stands in for a function that the disk refuses."""

    def fails(*given: Any) -> None:
        raise OSError(code, os.strerror(code), *path)

    return fails


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, r"was not written: the disk is full \(.*weights/vision_00000.safetensors\)"), (errno.EIO, "Input")],
)
def test_an_error_is_one_line_and_the_one_before_stays(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    saver = made.saver(tmp_path)
    made.save(saver)
    saver.wait()

    monkeypatch.setattr(tensors, "write", failing(code))
    made.done = 2
    made.save(saver)
    saver._thread.join()  # type: ignore[union-attr]
    assert saver.failed
    with pytest.raises(UserError, match=words):
        saver.wait()
    assert checkpoint.find(tmp_path).name == "step_000001" and not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Path, "replace"), (manifest, "drop_all_but")],
    ids=["latest", "old ones"],
)
def test_an_error_after_the_commit_says_that_the_checkpoint_is_there(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The rename makes the checkpoint; `latest` is moved and the old ones go after it."""
    saver = made.saver(tmp_path)
    made.save(saver)
    saver.wait()

    made.done = 2
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(errno.ENOSPC, "there"))
        path = made.save(saver)
        with pytest.raises(UserError) as said:
            saver.wait()
    assert str(said.value) == (
        "checkpoint step_000002 is whole on the disk, but then came an error: the disk is full (there); "
        "free some space, then start the run again"
    )
    assert checkpoint.verify(path) == [] and manifest.newest(tmp_path)[0] == path
    saver.close()


def failing_run(words: list[str], errors: str) -> int:
    """Rank 1's second save, in the background, meets a full disk. errors: a file for what each rank says."""
    from vlm_nemo import cli

    sys.stderr = open(f"{errors}.{os.environ['RANK']}", "w", buffering=1)  # noqa: SIM115  # until the process ends

    real, calls = tensors.write, []

    def write(path: Path, *given: Any) -> Any:
        if "step_000004" in str(path) and os.environ["RANK"] == "1":
            calls.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *given)

    tensors.write = write
    return cli.main(["train", *words])


def test_a_full_disk_of_one_rank_ends_all_with_a_line(shards: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "trainer.steps=1000", "checkpoint.every=2"]
    assert run_ranks(failing_run, 2, words, f"{tmp_path}/said") == [2, 2]
    said = "".join((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step_000004 was not written: the disk is full (" in errors[0]
    assert "_00001.safetensors" in errors[0]
    assert checkpoint.find(tmp_path).name == "step_000002" and checkpoint.verify(checkpoint.find(tmp_path)) == []
    assert len(runs.metrics(tmp_path)) < 100
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []


def dying(folder: str, point: int) -> None:
    """kill -9 at the n-th thing that a second save, in the background, does to the file system."""
    done = 0

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            nonlocal done
            done += 1
            if done > point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **more)

        return wrapped

    torch.set_num_threads(1)
    with device.adapter():
        made = trained(ParallelConfig(), optim_cfg=STAGE1)
        saver = made.saver(Path(folder), keep=1)
        made.done = 1
        made.save(saver)
        saver.wait()
        for owner, name in (
            *((manifest, each) for each in ("write_json", "sync", "share", "publish", "remove")),
            (Path, "rename"),
            (Path, "replace"),
            (tensors, "write"),
            (shutil, "rmtree"),
        ):
            setattr(owner, name, counting(getattr(owner, name)))
        made.done = 2
        made.save(saver)
        saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("point", [0, 1, 4, 9, 12, 15, 18, 21])
def test_kill_9_leaves_the_old_or_the_new_one(tmp_path: Path, point: int) -> None:
    process = warm.context().Process(target=dying, args=(str(tmp_path), point))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    found = checkpoint.find(tmp_path)
    assert checkpoint.verify(found) == []
    assert checkpoint.read(found).step == manifest.step_of(found)
    if point < 9:
        assert found.name == "step_000001"


def test_a_frozen_part_is_written_once(tmp_path: Path) -> None:
    """Later checkpoints have the same bytes under a second name, and are complete without the first."""
    with device.adapter():
        made = trained(ParallelConfig(), optim_cfg=STAGE1)
        saver = made.saver(tmp_path / "one")
        paths = []
        for _ in range(3):
            made.steps(1)
            paths.append(made.save(saver))
        saver.wait()
        saver.close()
        same = [[inode(path, part) for path in paths] for part in ("vision", "language", "projector")]
        assert [len(set(inodes)) for inodes in same] == [1, 1, 3]
        assert not list((tmp_path / "one").glob(".*"))
        shutil.copytree(paths[2], tmp_path / "copy")
        for path in paths[:2]:
            shutil.rmtree(path)
        for path in (paths[2], tmp_path / "copy"):
            assert checkpoint.verify(path) == []
        losses = made.steps(1)
        assert trained(ParallelConfig(), tmp_path / "copy", STAGE1).steps(1) == losses

        # A second stage begins with the same tower; the decoder learns now, and is written anew
        second = trained(ParallelConfig(), paths[2], STAGE2, resume=False)
        saver = second.saver(tmp_path / "two", source=paths[2])
        shutil.rmtree(tmp_path / "copy")
        path = second.save(saver, wait=True)
        assert inode(path, "vision") == inode(paths[2], "vision") != 0
        assert inode(path, "language") != inode(paths[2], "language")
        # Not what was started afresh, nor what is of another precision
        for more, precision in (({"fresh": ["vision"]}, "fp32"), ({}, "bf16")):
            other = trained(ParallelConfig(), paths[2], STAGE2, precision, resume=False)
            saver = other.saver(tmp_path / f"three{precision}", source=paths[2], **more)
            assert inode(other.save(saver, wait=True), "vision") != inode(paths[2], "vision")
        groups.stop()


def inode(step_folder: Path, part: str) -> int:
    return (step_folder / "weights" / f"{part}_00000.safetensors").stat().st_ino


def test_a_file_system_without_links_gets_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    with device.adapter():
        made = trained(ParallelConfig(), optim_cfg=STAGE1)
        saver = made.saver(tmp_path)
        paths = []
        for made.done in (1, 2):
            paths.append(made.save(saver))
        saver.wait()
        assert inode(paths[0], "vision") != inode(paths[1], "vision")
        assert checkpoint.verify(paths[1]) == []
        groups.stop()
    entry = manifest.read_manifest(paths[0]).files["weights/vision_00000.safetensors"]
    manifest.share(paths[0] / entry.file, tmp_path / "copied", entry)
    assert (tmp_path / "copied").read_bytes() == (paths[0] / entry.file).read_bytes()
    (paths[0] / entry.file).write_bytes(b"x" * entry.bytes)
    with pytest.raises(OSError, match="is damaged"):
        manifest.share(paths[0] / entry.file, tmp_path / "again", entry)


def test_a_checkpoint_of_before_loads(tmp_path: Path) -> None:
    """All parts in one file, written by safetensors itself, and a manifest that says nothing of layout or frozen."""
    with device.adapter():
        made = trained(ParallelConfig(), optim_cfg=STAGE1)
        made.steps(1)
        path = made.save(made.saver(tmp_path / "new"), wait=True)
        losses = made.steps(1)
        shutil.copytree(path, tmp_path / "old")
        index, content = {}, {}
        for file in (tmp_path / "old" / "weights").iterdir():
            with safe_open(file, "pt") as opened:
                index |= json.loads(opened.metadata()["chunks"])
                content |= {f"{name} of {file.stem}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                index |= {f"{name} of {file.stem}": index.pop(name) for name in opened.keys()}  # noqa: SIM118
            file.unlink()
        save_file(content, tmp_path / "old" / "weights" / "rank_00000.safetensors", {"chunks": json.dumps(index)})
        (tmp_path / "old" / "manifest.json").unlink()
        manifest.write_manifest(tmp_path / "old")
        assert checkpoint.verify(tmp_path / "old") == []
        again = trained(ParallelConfig(), tmp_path / "old", STAGE1)
        # No file of it holds one part alone, so nothing can be shared with it
        taken = again.save(again.saver(tmp_path / "on", source=tmp_path / "old"), wait=True)
        assert hashes(taken) == hashes(path)
        assert again.steps(1) == losses
        groups.stop()


def dying_pair(folder: str, dies: bool) -> None:
    """Two ranks save, and rank 1 looks late how it ended, when rank 0 has nothing else to do; or it is killed with -9
    while both write a second one."""
    with device.adapter():
        made = trained(ParallelConfig(tensor=2))
        made.steps(1)
        saver = made.saver(Path(folder))
        made.save(saver)
        time.sleep(made.ranks.rank * 0.7)
        saver.wait()
        if not dies:
            return
        real = tensors.write

        def write(path: Path, *given: Any) -> Any:
            if made.ranks.rank == 1 and "optimizer" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *given)

        tensors.write = write
        made.done = 2
        made.save(saver)
        saver.wait()


def test_rank_0_waits_until_all_know(tmp_path: Path) -> None:
    run_ranks(dying_pair, 2, str(tmp_path), False)


def test_kill_9_of_one_rank_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(RankFailed):  # of rank 1, or of rank 0 that lost it
        run_ranks(dying_pair, 2, str(tmp_path), True)
    assert checkpoint.find(tmp_path).name == "step_000001" and checkpoint.verify(tmp_path / "step_000001") == []
    assert (tmp_path / ".step_000002.draft").is_dir()


def test_boxes_that_are_not_the_model_are_refused(made: Trained) -> None:
    mine = shares.held(checkpoint.local_parameters(made.chunks), made.optimizer)
    assert sum(shares.agree(mine, ()).loads["live"]) == 12 * sum(p.numel() for p in made.chunks[0].parameters())
    with pytest.raises(RuntimeError, match=r"no rank holds some of the optimizer's state of \w+\."):
        shares.agree([p for p in mine if p.what == shares.WEIGHT or p.start] + [_half(mine)], ())
    twice = next(p for p in mine if p.what == shares.WEIGHT)
    moved = shares.Held(**{**vars(twice), "box": type(twice.box)(**{**vars(twice.box), "offset": (1,) * 9})})
    with pytest.raises(RuntimeError, match=r"boxes of vision\..* have \d+ elements, the tensor \d+"):
        shares.agree([*mine, moved], ())


def _half(mine: list[shares.Held]) -> shares.Held:
    first = next(p for p in mine if p.what == shares.STATE)
    return shares.Held(**{**vars(first), "stop": first.stop // 2})


def stopping_run(words: list[str]) -> int:
    """SIGTERM while the disk is slow: right after the step whose save has begun."""
    from vlm_nemo import cli

    real = tensors.write

    def write(path: Path, *given: Any) -> Any:
        if "step_000002" in str(path) and "optimizer" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(path, *given)

    tensors.write = write
    return cli.main(["train", *words])


def test_a_signal_during_a_save_ends_with_both(shards: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "trainer.steps=1000", "checkpoint.every=2"]
    assert run_ranks(stopping_run, 1, words) == [0]
    last = runs.trace(tmp_path)[-1][0]
    names = [path.name for path in checkpoint.newest(tmp_path / "checkpoints")]
    assert last > 2 and names == [manifest.step_folder(last), "step_000002"]
    assert all(checkpoint.verify(tmp_path / "checkpoints" / name) == [] for name in names)
