"""launch/stageN.sh without Slurm: stand-ins for its commands, and a rank that does what a test says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT

RANK = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
run_dir = Path(os.environ["FAKE_RUN"])
if sys.argv[-1] == "--validate":
    sys.exit(int(os.environ.get("FAKE_VALIDATE", 0)))
if sys.argv[-1] == "--cfg":
    print(f"precision: fp32\\nrun_dir: '{{run_dir}}'\\ntrainer:\\n  run_dir: no")
    sys.exit()
with (run_dir / "words").open("a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
(run_dir / "environment").write_text(json.dumps(dict(os.environ)))
def progress(step, steps=10):
    (run_dir / "run.json").write_text(json.dumps({{"step": step, "steps": steps, "seconds": 1.5}}) + "\\n")
def wait_for_usr2():
    time.sleep(0.5)  # a second call comes: this one must not kill, and may be lost
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    (run_dir / "waiting").touch()
    signal.sigwait([signal.SIGUSR2])
def refuse(line):
    Path(os.environ["VLM_NEMO_ERROR_FILE"]).write_text(line)
    sys.exit(2)
(run_dir / "pid").write_text(str(os.getpid()))
exec(os.environ["FAKE_RANK"])
"""

COMMANDS = {
    "python": RANK,
    "srun": """#!/usr/bin/env bash
while [ "$1" != bash ] && [ "$1" != env ]; do echo "$1" >>"$FAKE_RUN/srun"; shift; done
SLURM_PROCID=${FAKE_PROCID:-0} SLURM_LOCALID=3 exec "$@"
""",
    "scontrol": """#!/usr/bin/env bash
case $1 in show) printf 'n1\\nn2\\n' ;; *) echo "$*" >>"$FAKE_RUN/scontrol" ;; esac
""",
    "scancel": """#!/usr/bin/env bash
echo "$*" >>"$FAKE_RUN/scancel"
[ ! -f "$FAKE_RUN/pid" ] || kill -USR2 "$(cat "$FAKE_RUN/pid")"
""",
    "sleep": """#!/usr/bin/env bash
exec /bin/sleep 0.1
""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of four tasks on two nodes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "VLM_NEMO_", "OMP_", "MASTER_"))}
    return {
        **inherited,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "VLM_NEMO_PYTHON": f"{tmp_path}/bin/python",
        "PYTHON": "/nowhere",  # what make builds .venv with is no matter of a job's
        "FAKE_RUN": f"{tmp_path}/run",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }


def stage(job: dict[str, str], rank: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["launch/stage2.sh", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**job, **env, "FAKE_RANK": rank}, capture_output=True, text=True, timeout=60
    )


def requeued(job: dict[str, str]) -> int:
    path = Path(job["FAKE_RUN"], "scontrol")
    return path.read_text().count("requeue 12345\n") if path.is_file() else 0


def test_a_job_that_ends_well(job: dict[str, str]) -> None:
    done = stage(job, "progress(10)", "trainer.steps=10", SLURM_CPUS_PER_TASK="6", CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert done.returncode == 0, done.stderr
    assert "4 ranks on n1 n2" in done.stdout and "done: 10 steps" in done.stdout and requeued(job) == 0
    run = Path(job["FAKE_RUN"])
    assert (run / "words").read_text() == "train recipe=llava15_7b/stage2 trainer.steps=10\n"
    got = json.loads((run / "environment").read_text())
    expected = {"RANK": "0", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "22345"}
    expected |= {"OMP_NUM_THREADS": "6", "SRUN_CPUS_PER_TASK": "6", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert {name: got.get(name) for name in expected} == expected


def test_the_word_recipe_and_a_restart(job: dict[str, str]) -> None:
    stage(job, "progress(10)", "recipe=my/one", "optim.lr=1", SLURM_RESTART_COUNT="2", CUDA_VISIBLE_DEVICES="3")
    run = Path(job["FAKE_RUN"])
    assert (run / "words").read_text() == "train recipe=my/one optim.lr=1 checkpoint.resume=true\n"
    assert json.loads((run / "environment").read_text())["LOCAL_RANK"] == "0", "Slurm shows the task one GPU"


def test_it_runs_where_it_was_submitted(job: dict[str, str], tmp_path: Path) -> None:
    """There lie the conf/ and recipes/ of one's own; VLM_NEMO_HOME is the project's folder."""
    (tmp_path / "mine").mkdir()
    rank = "(run_dir / 'folder').write_text(os.getcwd()); progress(10)"
    env = {**job, "SLURM_SUBMIT_DIR": str(tmp_path / "mine"), "VLM_NEMO_HOME": str(ROOT), "FAKE_RANK": rank}
    command = [str(ROOT / "launch" / "stage2.sh"), "model=mine"]
    done = subprocess.run(command, cwd=tmp_path / "mine", env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "folder").read_text() == str(tmp_path / "mine")


@pytest.mark.parametrize("when", ["while the ranks start", "while they train"])
def test_usr2_is_passed_on_until_it_is_heard(job: dict[str, str], when: str) -> None:
    environment = {**job, "FAKE_RANK": "progress(4); wait_for_usr2()"}
    process = subprocess.Popen(["launch/stage2.sh"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    path = Path(job["FAKE_RUN"]) / ("pid" if when == "while the ranks start" else "waiting")
    deadline = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and requeued(job) == 1
    assert "the time limit is near" in output and "stopped after step 4; requeued" in output


def test_term_is_the_end(job: dict[str, str]) -> None:
    environment = {**job, "FAKE_RANK": "progress(4); wait_for_usr2(); sys.exit(1)"}
    process = subprocess.Popen(["launch/stage2.sh"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    path = Path(job["FAKE_RUN"], "waiting")
    deadline = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    os.kill(int(Path(job["FAKE_RUN"], "pid").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and requeued(job) == 0 and "cancelled at step 4" in output


def test_failures_are_tried_again_while_checkpoints_come(job: dict[str, str]) -> None:
    for restart, (step, code) in enumerate([(5, 0), (5, 0), (7, 0), (7, 0), (7, 1)]):
        done = stage(job, f"progress({step}); sys.exit(9)", VLM_NEMO_MAX_RESTARTS="2", SLURM_RESTART_COUNT=f"{restart}")
        assert done.returncode == code, done.stdout
    assert requeued(job) == 4 and "failed with exit code 9; failure number 3 at step 7, so not requeued" in done.stdout
    # Mended and submitted again: what was counted then does not count now
    again = stage(job, "progress(7); sys.exit(9)", VLM_NEMO_MAX_RESTARTS="2", SLURM_RESTART_COUNT="0")
    assert again.returncode == 0 and "failure number 1 there; requeued" in again.stdout


def test_no_checkpoint_at_all(job: dict[str, str]) -> None:
    assert stage(job, "sys.exit(1)", VLM_NEMO_MAX_RESTARTS="0").returncode == 1
    assert requeued(job) == 0


@pytest.mark.parametrize(("rank", "printed"), [("0", ""), ("2", "error: no such tokenizer")])
def test_an_error_to_mend_is_not_tried_again(job: dict[str, str], rank: str, printed: str) -> None:
    done = stage(job, "refuse('error: no such tokenizer')", FAKE_PROCID=rank)
    assert (done.returncode, done.stderr, requeued(job)) == (2, printed, 0)
    assert "the same error would come again" in done.stdout


def test_a_bad_word_starts_nothing(job: dict[str, str]) -> None:
    done = stage(job, "progress(10)", FAKE_VALIDATE="2")
    assert done.returncode == 2 and done.stdout == "" and not Path(job["FAKE_RUN"], "words").exists()


def test_ranks_that_end_early_unasked(job: dict[str, str]) -> None:
    """So that the next stage does not start from half a model."""
    done = stage(job, "progress(4)")
    assert done.returncode == 3 and requeued(job) == 0 and "ended at step 4, before the run's end" in done.stdout


def test_a_container_and_more_words_for_srun(job: dict[str, str]) -> None:
    more = {"VLM_NEMO_CONTAINER": "my image.sqsh", "VLM_NEMO_MOUNTS": "/data:/data", "VLM_NEMO_SRUN": "--a=1 --b"}
    assert stage(job, "progress(10)", **more).returncode == 0
    words = Path(job["FAKE_RUN"], "srun").read_text().splitlines()
    container = ["--container-image=my image.sqsh", f"--container-mounts={ROOT}:{ROOT},/data:/data"]
    container.append(f"--container-workdir={ROOT}")
    once = ["--nodes=1", "--ntasks=1", "--overlap", *container]
    assert words == [*once, *once, "--export=ALL", "--kill-on-bad-exit=1", *container, "--a=1", "--b"]


def test_outside_slurm_it_says_what_to_do(job: dict[str, str]) -> None:
    del job["SLURM_JOB_ID"], job["SLURM_SUBMIT_DIR"]
    done = stage(job, "")
    assert done.returncode == 2 and done.stderr.startswith("error: this is a Slurm job: sbatch launch/stage2.sh")


def test_a_pipeline_is_checked_before_the_first_job(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VLM_NEMO_PYTHON": sys.executable}
    command = ["launch/pipeline.sh", "--nodes=2", "shapes", "stage3:trainer.stepps=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: no option trainer.stepps; did you mean trainer.steps?\n"
    assert not (tmp_path / "submitted").exists()
