"""A run that was killed goes on as if nothing had happened, at its own layout to the bit, at another one closely."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from tests.ranks import run_ranks

STEPS = 10


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    base = [*runs.TINY, *runs.data_words(shards), f"run_dir={run_dir}", f"trainer.steps={STEPS}", "checkpoint.every=3"]
    return [*base, *more]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    runs.vlm_nemo("train", *words(shards, run_dir))
    assert [step for step, _, _ in runs.trace(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


@pytest.fixture(scope="module")
def half(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first five steps of it."""
    run_dir = tmp_path_factory.mktemp("half")
    runs.vlm_nemo("train", *words(shards, run_dir, "trainer.stop_at=5"))
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_000005"
    return run_dir


def test_kill_9_and_resume_is_bitwise_equal(whole: Path, shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm_nemo", "train", *words(shards, tmp_path)]
    path = tmp_path / "metrics.jsonl"
    with runs.started(command) as process:
        deadline = time.monotonic() + 120
        while not (path.is_file() and path.read_text().count("\n") >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it has not ended meanwhile
        second = runs.vlm_nemo("train", *words(shards, tmp_path), code=2)
        assert f"{tmp_path} is being written by process {process.pid} on " in second.stderr
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert len(runs.trace(tmp_path)) < STEPS, "killed too late to show anything"

    runs.vlm_nemo("train", *words(shards, tmp_path))
    assert runs.trace(tmp_path) == runs.trace(whole)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger == json.loads((whole / "ledger.json").read_text())
    assert ledger["seen"] == ledger["used"] + sum(n for d in ledger["dropped"].values() for n in d.values())


@pytest.mark.parametrize(
    ("ranks", "layout", "says"),
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.vision=1"], "vision: 2 ranks share out the im"),
        (2, ["parallel.pipeline=2", "parallel.distributed_optimizer=false"], "pipeline: parallel.layers=[2,2]: stag"),
        (2, ["data.micro_packs=2"], "going on from"),
        (2, ["parallel.context=2"], "vision: 2 ranks share out the images of a row, the busiest does 1."),
    ],
    ids=["tp2_sp", "pp2", "dp2_micro2", "cp2"],
)
def test_resume_at_another_layout(
    whole: Path, half: Path, shards: Path, tmp_path: Path, ranks: int, layout: list[str], says: str
) -> None:
    """Written by one process, read by two; optimizer state, data position and all."""
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    done = runs.vlm_nemo("train", *words(shards, tmp_path, *layout), ranks=ranks)
    assert says in done.stderr
    layers = yaml.safe_load((tmp_path / "config.yaml").read_text())["parallel"]["layers"]
    assert layers == ([2, 2] if "parallel.pipeline=2" in layout else [])
    found, expected = runs.trace(tmp_path), runs.trace(whole)
    assert found[:5] == expected[:5]
    assert [s for s, _, _ in found] == [s for s, _, _ in expected]
    for (_, loss, norm), (_, true_loss, true_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], marks=pytest.mark.slow, id="dp2"),
        pytest.param(["parallel.tensor=2"], id="tp2"),
        pytest.param(["parallel.context=2"], marks=pytest.mark.slow, id="cp2"),
    ],
)
def test_written_by_two_read_by_one(whole: Path, shards: Path, tmp_path: Path, layout: list[str]) -> None:
    """The distributed optimizer's shares of two data ranks or two context ranks, and two tensor halves, become one
    process's state."""
    runs.vlm_nemo("train", *words(shards, tmp_path, "trainer.stop_at=4", *layout), ranks=2)
    runs.vlm_nemo("train", *words(shards, tmp_path))
    for (_, loss, norm), (_, true_loss, true_norm) in zip(runs.trace(tmp_path), runs.trace(whole), strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-5)


def test_four_replicas_two_and_four_again(whole: Path, shards: Path, tmp_path: Path) -> None:
    """The same samples in every step, also with other numbers of threads, and the losses of one process."""
    for ranks, stop, threads in ((4, 3, 2), (2, 7, 0), (4, STEPS, 1)):
        runs.vlm_nemo(
            "train", *words(shards, tmp_path, f"trainer.stop_at={stop}", f"data.threads={threads}"), ranks=ranks
        )
    found, expected = runs.metrics(tmp_path), runs.metrics(whole)
    for one, truth in zip(found, expected, strict=True):
        for name in ("step", "samples", "tokens", "supervised_tokens", "fill", "delay"):
            assert one[name] == truth[name], name
        assert one["loss"] == pytest.approx(truth["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    assert json.loads((tmp_path / "ledger.json").read_text()) == json.loads((whole / "ledger.json").read_text())


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("SIGINT", 1, marks=pytest.mark.slow),
        ("SIGTERM", 2),
        pytest.param("SIGUSR1", 1, marks=pytest.mark.slow),
        pytest.param("SIGUSR2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_well(shards: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """Exit code 0, a line that says so, a checkpoint at the step that was under way."""
    command = ["launch/local.sh", str(ranks), "train", *words(shards, tmp_path, "trainer.steps=100000")]
    path = tmp_path / "metrics.jsonl"
    with runs.started(command) as process:
        deadline = time.monotonic() + 120
        while not (path.is_file() and path.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{name}: stopped after step" in errors
    last = runs.trace(tmp_path)[-1][0]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{last:06d}"


def signalled_run(words: list[str]) -> int:
    """Rank 1 alone gets a SIGTERM, right after the ranks agreed to go on: the last step that it did."""
    import importlib

    from vlm_nemo import cli
    from vlm_nemo.train.trainer import Trainer

    judge, done = Trainer._judge, []

    def judging(self: Trainer, books: Any) -> None:
        judge(self, books)
        done.append(self)
        if len(done) == 2 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    importlib.import_module("vlm_nemo.train.trainer").Trainer._judge = judging
    assert cli.main(["train", *words]) == 0
    return len(done)


def test_a_signal_to_one_rank_between_two_steps_stops_all_at_the_same_step(shards: Path, tmp_path: Path) -> None:
    assert run_ranks(signalled_run, 2, words(shards, tmp_path)) == [3, 3]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_000003"
    assert [step for step, _, _ in runs.trace(tmp_path)] == [1, 2, 3]


def skipping_run(words: list[str], bad_step: int) -> None:
    """A run in which one step's gradient is not finite."""
    from vlm_nemo import cli
    from vlm_nemo.train import step as steps

    real, calls = steps.gradient_norm, []

    def gradient_norm(optimizer):  # type: ignore[no-untyped-def]
        calls.append(1)
        return real(optimizer) * (float("nan") if len(calls) == bad_step else 1.0)

    steps.gradient_norm = gradient_norm
    assert cli.main(["train", *words]) == 0


def test_resume_after_a_skipped_step_is_bitwise_equal(shards: Path, tmp_path: Path) -> None:
    """AdamW counts its updates, not the run's steps."""
    six = "trainer.steps=6"
    run_ranks(skipping_run, 1, words(shards, tmp_path / "whole", six), 2)
    run_ranks(skipping_run, 1, words(shards, tmp_path / "broken", six, "trainer.stop_at=4"), 2)
    runs.vlm_nemo("train", *words(shards, tmp_path / "broken", six))
    whole, broken = runs.trace(tmp_path / "whole"), runs.trace(tmp_path / "broken")
    assert [m["skipped"] for m in runs.metrics(tmp_path / "whole")] == [0, 1, 0, 0, 0, 0]
    assert whole[1][2] is None and broken == whole


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole: Path, shards: Path, tmp_path: Path) -> None:
    runs.vlm_nemo("train", *words(shards, tmp_path, "trainer.stop_at=7"))
    file = next((tmp_path / "checkpoints" / "step_000007" / "weights").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = runs.vlm_nemo("train", *words(shards, tmp_path))
    assert "step_000007 is damaged" in done.stderr and ".step_000007.damaged" in done.stderr
    assert "going on from" in done.stderr and "step_000006" in done.stderr
    assert runs.trace(tmp_path) == runs.trace(whole)
