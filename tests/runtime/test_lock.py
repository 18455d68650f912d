"""A folder has one writer, and a dead one holds nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.lock import LOCK, folder_lock, job_lock
from vlm_nemo.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from vlm_nemo.runtime.lock import folder_lock
with folder_lock(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """By another process, until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_the_second_is_refused_with_the_first_ones_pid_until_it_dies(tmp_path: Path) -> None:
    with held(tmp_path / "out") as holder:
        for patience in (0.0, 600.0):  # the first one is on this machine, so it is alive
            with pytest.raises(UserError, match=rf"out is being written by process {holder.pid} on .*; wait for it"):
                with folder_lock(tmp_path / "out", "out", patience):
                    pass
    with folder_lock(tmp_path / "out", "out"):
        pass


def test_one_process_may_hold_it_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), folder_lock(tmp_path, "out"):
            raise KeyError


def test_a_lock_that_cannot_be_opened_is_the_user_s_to_mend(tmp_path: Path) -> None:
    """As where somebody took the right to write from a run that is done, which its owner may still touch."""
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=r"run_dir=.* cannot be written: .*\.lock'; choose another folder"):
        with folder_lock(tmp_path, "run_dir"):
            pass


def test_a_holder_whose_name_is_no_text_is_still_one(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="is being written by"), folder_lock(tmp_path, "run_dir"):
            pass


def test_the_end_of_another_machine_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with held(tmp_path) as holder:
        (tmp_path / LOCK).write_text("process 7 on elsewhere\n")
        with pytest.raises(UserError, match="is being written by process 7 on elsewhere"):
            with folder_lock(tmp_path, "run_dir", patience=0.5):
                pass
        threading.Timer(1.0, holder.kill).start()
        began = time.monotonic()
        with folder_lock(tmp_path, "run_dir", patience=60):
            assert time.monotonic() - began < 30
    assert "is held by process 7 on elsewhere; waiting up to 60 s for its end" in caplog.text


def _one_job(folder: str) -> str:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        try:
            with job_lock(Path(folder), "run_dir"):
                return "went on"
        except UserError as error:
            return str(error)
        finally:
            groups.stop()


def test_every_rank_of_a_second_job_is_refused_alike(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        said = run_ranks(_one_job, 2, str(tmp_path))
        assert said[0] == said[1] and f"is being written by process {holder.pid} on " in said[0]
    assert run_ranks(_one_job, 2, str(tmp_path)) == ["went on", "went on"]
