"""A signal to stop, at any moment of a run's life."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import runs
from vlm_nemo.runtime.signals import HELD, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *HELD])
def test_a_signal_is_remembered_and_everything_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with stop_on_signals() as request:
        assert request.name is None
        # To this thread: which one gets a signal of the process depends on what earlier tests left running
        signal.raise_signal(number)
        assert request.name == number.name
        signal.raise_signal(signal.SIGUSR2)  # one more, while the checkpoint is written
        assert request.name == number.name
    assert (signal.getsignal(number), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def test_a_second_interrupt_means_it() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_from_before_may_receive_it() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with stop_on_signals() as request:
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, signal.SIGUSR2)
            deadline = time.monotonic() + 10
            while request.name is None and time.monotonic() < deadline:
                time.sleep(0.001)
            assert request.name == "SIGUSR2"
    finally:
        done.set()
        thread.join()


HOLDING = """
import os, signal, subprocess
from vlm_nemo.runtime.signals import HELD, hold, stop_on_signals

hold()
os.kill(os.getpid(), signal.SIGUSR2)
child = subprocess.Popen(["sleep", "60"])  # as a logger's helper
try:
    child.send_signal(signal.SIGUSR2)
    child.send_signal(signal.SIGUSR1)
    with stop_on_signals() as request:
        assert request.name == "SIGUSR2", request.name
        try:
            child.wait(timeout=0.2)
            raise SystemExit("the child is gone")
        except subprocess.TimeoutExpired:
            pass
    assert signal.sigtimedwait(HELD, 0) is not None
finally:
    child.kill()
    child.wait()
"""


def test_held_before_the_handlers_and_by_children() -> None:
    """In a process of its own: threads that others of these tests have started hold nothing."""
    runs.run([sys.executable, "-c", HOLDING])


def test_a_signal_while_torch_is_imported(shards: Path, tmp_path: Path) -> None:
    """As soon as the process holds it: the run ends well before its first step."""
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "trainer.steps=100000"]
    command = [sys.executable, "-m", "vlm_nemo", "train", *words]
    with runs.started(command) as process:
        deadline = time.monotonic() + 60
        while not held(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR2)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "SIGUSR2: stopped before the first step; the same command goes on" in errors
    assert '"step": 0, "steps": 100000' in (tmp_path / "run.json").read_text()


def held(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")), 16)
    return bool(mask & (1 << (signal.SIGUSR2 - 1)))
