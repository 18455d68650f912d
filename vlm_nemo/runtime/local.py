"""Run a verb on N processes of this machine: `python -m vlm_nemo.runtime.local N VERB …` (see launch/local.sh).

Gives each process the variables that torchrun gives (RANK, LOCAL_RANK, WORLD_SIZE, …) and differs from it in three
ways that a training run needs: a signal goes on to the ranks, which finish their step, save and exit; a failing rank's
exit code is the command's; and one error is one line, without a banner. No torch here.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

GRACE_S = 10.0
"""After one rank fails: how long the others have to fail by themselves, then how long to end after SIGTERM."""

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """`N VERB …` -> exit code: 0 when every rank ended with 0, else that of the rank that failed first."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or not words[0].isdigit() or int(words[0]) < 1:
        print("error: usage: launch/local.sh N VERB [key=value …], with N processes", file=sys.stderr)
        return 2
    return launch(int(words[0]), [sys.executable, "-m", "vlm_nemo", *words[1:]])


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run `command` as `ranks` processes that know of each other; return the exit code."""
    workers: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="vlm_nemo_") as errors:
        common = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "VLM_NEMO_STARTED": os.environ.get("VLM_NEMO_STARTED", str(int(time.time()))),
        }
        # megatron-core's overlap of tensor-parallel communication relies on the order that this gives
        common.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
        # A signal that comes while the ranks are being started waits until all can be told.
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "VLM_NEMO_ERROR_FILE": f"{errors}/{rank}"}
                # A session of its own: a terminal's Ctrl-C reaches the ranks once, through `forward`.
                workers.append(
                    subprocess.Popen(command, env={**common, **own}, start_new_session=True, preexec_fn=_prepare_child)
                )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            code = _wait(workers)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            for number, handler in before.items():
                signal.signal(number, handler)
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        _pass_on_error(code, workers, Path(errors))
    return code


def _prepare_child() -> None:
    """In the new process, before the command: unblock the signals, and die with the launcher."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all. When one fails the others get GRACE_S to end by themselves, then SIGTERM, then SIGKILL."""
    failed: subprocess.Popen[bytes] | None = None
    steps = [subprocess.Popen.terminate, subprocess.Popen.kill]
    deadline = float("inf")
    while running := [worker for worker in workers if worker.poll() is None]:
        if failed is None:
            failed = next((worker for worker in workers if worker.returncode not in (0, None)), None)
            deadline = time.monotonic() + GRACE_S if failed is not None else deadline
        if steps and time.monotonic() > deadline:
            stop, deadline = steps.pop(0), time.monotonic() + GRACE_S
            for worker in running:
                stop(worker)
        time.sleep(0.05)
    failed = failed or next((worker for worker in workers if worker.returncode != 0), None)
    if failed is None:
        return 0
    return failed.returncode if failed.returncode > 0 else 128 - failed.returncode


def _pass_on_error(code: int, workers: Sequence[subprocess.Popen[bytes]], errors: Path) -> None:
    """Say why, where rank 0 has not: another rank's error line, or which rank a signal ended."""
    if code == 0:
        return
    lines = [path.read_text(encoding="utf-8") for path in sorted(errors.iterdir(), key=lambda p: int(p.name))]
    if lines and workers[0].returncode != 2:
        print(lines[0], file=sys.stderr)
    for rank, worker in enumerate(workers):
        if worker.returncode < 0 and 128 - worker.returncode == code:
            print(f"rank {rank} was ended by {signal.Signals(-worker.returncode).name}", file=sys.stderr)
            return


def free_port() -> int:
    """A port that nobody listens on, below the range from which the kernel takes ports for outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 30000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 30000")


if __name__ == "__main__":
    sys.exit(main())
