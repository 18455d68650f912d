"""The tests' cluster leaves nothing behind, not even where its owner is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import runs
from tests.slurm.cluster import Cluster, processes_of

OWNER = """
import time
from tests.slurm.cluster import Cluster
with Cluster(nodes=2) as cluster:
    cluster.submit("--output=/dev/null", "--wrap", "sleep 1000")
    print(cluster.work, flush=True)
    time.sleep(1000)
"""


def test_a_second_cluster_whose_owner_is_killed(cluster: Cluster) -> None:
    command = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    work = Path(owner.stdout.readline().strip())
    assert work.is_dir() and len(processes_of(work)) > 5
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while processes_of(work):
        assert time.monotonic() < deadline, processes_of(work)
        time.sleep(0.1)
    shutil.rmtree(work)
    interfaces = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True).stdout
    assert "bridge0" not in interfaces and "cable" not in interfaces
    assert cluster.ask("sinfo", "-hNt", "idle", "-o", "%n").split()
