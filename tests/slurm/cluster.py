"""A real Slurm on this machine for the tests: Debian's packages, nodes in namespaces, GPUs that are only device files.

The whole cluster lives in namespaces of one child process (cluster.sh). When that process ends, however it ends, the
kernel takes down every daemon, job, interface and mount in there: nothing is left and nothing can collide.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.runs import ROOT

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""Program -> Debian package."""

GPUS = 8
PR_SET_PDEATHSIG = 1

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

SLURM_CONF = """\
ClusterName=ci
SlurmctldHost=control(10.77.0.254)
SlurmUser=root
AuthInfo=socket={work}/run/munge.socket
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool/%n
SlurmctldPidFile={work}/run/slurmctld.pid
SlurmdPidFile={work}/run/slurmd.%n.pid
SlurmctldLogFile={work}/log/slurmctld.log
SlurmdLogFile={work}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=100
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={work}/log/jobcomp.log
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=8 RealMemory=6000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be made here, in words; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]:
        return f"Slurm is not installed: apt-get install {' '.join(missing)}"
    probe = "ip link add bridge0 type bridge && mount --bind /etc/hosts /etc/hosts"
    command = ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "sh", "-c", probe]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode != 0:
        return f"namespaces are not allowed here (CAP_SYS_ADMIN, CAP_NET_ADMIN): {tried.stderr.strip()}"
    return None


class Cluster:
    """Four nodes of eight CPUs and eight fake GPUs; a context manager."""

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = nodes
        self.work = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # short: paths of sockets end at 108 characters
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE"))},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": f"{self.work}/etc/slurm.conf",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._process = subprocess.Popen(
                ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]
                + [str(Path(__file__).with_name("cluster.sh")), str(self.work), str(self.nodes)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=(self.work / "log" / "cluster.log").open("w"),
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
            self._wait(self._all_idle, 60, "nodes to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
            self._wait(lambda: not processes_of(self.work), 30, "the cluster's processes to end")
        shutil.rmtree(self.work, ignore_errors=True)

    def run(self, *command: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the control host, in the project's folder."""
        return subprocess.run(
            ["nsenter", f"--target={self._process.pid}", "--net", "--uts", *map(str, command)],
            cwd=ROOT,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ask(self, *command: object, env: Mapping[str, str] | None = None) -> str:
        """The output of a command that has to succeed."""
        done = self.run(*command, env=env)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, *words: object, env: Mapping[str, str] | None = None) -> int:
        """`sbatch WORDS`; the job's number."""
        return int(self.ask("sbatch", "--parsable", *words, env=env))

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, Reason, NodeList, …"""
        return dict(re.findall(r"([A-Z][\w/:]*)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def wait(self, number: int, *states: str, timeout: float = 400) -> dict[str, str]:
        """Wait until a job is in one of the states (any end by default); what Slurm knows of it then."""
        wanted, found = states or ENDED, {}

        def there() -> bool:
            found.update(self.job(number))
            if not states or found["JobState"] in wanted:
                return found["JobState"] in wanted
            assert found["JobState"] not in ENDED, f"job {number} is {found['JobState']}:\n{self.logs(number)}"
            return False

        self._wait(there, timeout, f"job {number} to be {' or '.join(wanted)}")
        return found

    def wait_until(self, condition: Callable[[], bool], number: int, timeout: float = 400) -> None:
        """Wait for something that a job does; fails where the job ends before."""

        def there() -> bool:
            if condition():
                return True
            state = self.job(number)["JobState"]
            assert state not in ENDED, f"job {number} is {state}:\n{self.logs(number)}"
            return False

        self._wait(there, timeout, f"something in job {number}")

    def start_now(self, number: int) -> None:
        """Skip the two minutes for which Slurm holds back a requeued job; sooner than this its nodes are not free."""
        self.wait(number, "PENDING")
        time.sleep(2.5)
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def logs(self, number: int | None = None) -> str:
        """The job's own output, or the daemons' last words."""
        if number is not None:
            path = Path(self.job(number)["StdOut"])
            return path.read_text() if path.is_file() else f"{path} is not there"
        files = sorted((self.work / "log").iterdir())
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}\n{self.logs()}"
            time.sleep(0.2)

    def _all_idle(self) -> bool:
        assert self._process.poll() is None, f"the cluster ended:\n{self.logs()}"
        return len(self.run("sinfo", "-hNt", "idle", "-o", "%n").stdout.split()) == self.nodes

    def _write_files(self) -> None:
        self.work.chmod(0o755)  # munged wants to be reachable
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.work / name).mkdir()
        etc = self.work / "etc"
        (etc / "slurm.conf").write_text(SLURM_CONF.format(work=self.work, nodes=self.nodes, gpus=GPUS))
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # right also where none is mounted
        gpus = f"{self.work}/dev/nvidia[0-{GPUS - 1}]"
        (etc / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu File={gpus}\n")
        hosts = [f"10.77.0.{k} node{k}" for k in range(1, self.nodes + 1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 control", *hosts]) + "\n")
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for i in range(GPUS):  # character devices, here of /dev/null: Slurm wants no other kind
            os.mknod(self.work / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))


def processes_of(work: Path) -> list[str]:
    """Processes whose command line or environment names a cluster's folder: daemons and jobs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(work).encode() in (folder / name).read_bytes() for name in ("cmdline", "environ")):
                found.append(folder.name)
        except OSError:
            continue
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
