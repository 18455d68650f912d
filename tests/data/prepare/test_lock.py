"""A folder has one writer, and a dead one holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlm_nemo.data.prepare.lock import folder_lock
from vlm_nemo.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from vlm_nemo.data.prepare.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_with_the_first_ones_pid_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"out is being written by process {holder.pid} on .*; wait for it"):
            with folder_lock(tmp_path / "out"):
                pass
        holder.kill()
    with folder_lock(tmp_path / "out"):
        pass


def test_one_process_may_hold_it_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), folder_lock(tmp_path):
            raise KeyError
