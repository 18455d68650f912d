"""launch/stage2.sh and launch/pipeline.sh, as they are, under a real Slurm: two nodes, two ranks on each."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import runs
from tests.slurm.cluster import Cluster

STEPS = 24
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
ONE_BY_TWO = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
ONE = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]

pytestmark = pytest.mark.timeout(600)


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    base = [*runs.TINY, *runs.data_words(shards), f"run_dir={run_dir}", f"trainer.steps={STEPS}", "checkpoint.every=5"]
    return [*base, *more]


def submit(cluster: Cluster, tmp_path: Path, options: list[str], *words: str, **env: str) -> int:
    output = f"--output={tmp_path}/%j.log"
    return cluster.submit(output, *options, "launch/stage2.sh", *words, env=env)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def ranks_of(job: int) -> dict[int, int]:
    """Rank -> process number, of the job's ranks that run vlm_nemo."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
            command = (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("SLURM_JOB_ID") == str(job) and "RANK" in variables and "vlm_nemo" in command[:3]:
            found[int(variables["RANK"])] = int(folder.name)
    return found


class Chain(NamedTuple):
    """What launch/pipeline.sh submitted."""

    folder: Path
    jobs: list[int]
    dependency: str
    """Of the last job, while the first ones run."""


@pytest.fixture(scope="module", autouse=True)
def chain(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Three stages of one process each, submitted before the first test: they run while others wait."""
    folder = tmp_path_factory.mktemp("chain")
    common = [*runs.TINY[1:], *runs.data_words(shards), "trainer.steps=3"]
    own = [f"stage{n}:run_dir={folder}/stage{n}" for n in (1, 2, 3)]
    load = [f"stage{n}:checkpoint={folder}/stage{n - 1}/checkpoints" for n in (2, 3)]
    first = ["stage1:checkpoint.load=null", "stage1:checkpoint.reset=[]"]
    own.append(f"stage3:data.sources.relations.path={shards}/relations")
    said = cluster.ask("launch/pipeline.sh", f"--output={folder}/%j.log", *ONE, "shapes", *common, *own, *load, *first)
    jobs = [int(number) for number in re.findall(r"^stage \d: job (\d+)", said, flags=re.MULTILINE)]
    assert len(jobs) == 3 and f"scancel {jobs[0]} {jobs[1]} {jobs[2]}" in said
    return Chain(folder, jobs, cluster.job(jobs[2])["Dependency"])


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts, without Slurm."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.vlm_nemo("train", *words(shards, run_dir), ranks=4)
    assert [step for step, _, _ in runs.trace(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def test_the_time_limit_saves_requeues_and_goes_on_to_the_bit(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, TWO_BY_TWO, *words(shards, run_dir))
    cluster.wait_until(lambda: steps_done(run_dir) >= 2, job)
    cluster.ask("scancel", "--batch", "--signal=USR2", job)  # what --signal=B:USR2@300 does at its time
    cluster.start_now(job)
    stopped = re.search(r"stopped after step (\d+); requeued", cluster.logs(job))
    assert stopped and 2 <= int(stopped[1]) < STEPS, cluster.logs(job)

    ended = cluster.wait(job)
    log = cluster.logs(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert f"step_{int(stopped[1]):06d} (step {stopped[1]})" in log and f"done: {STEPS} steps" in log
    # Whichever two the chain leaves
    assert re.search(r"4 ranks on node\d node\d -> ", log) and not (run_dir / "slurm").exists()
    assert runs.trace(run_dir) == runs.trace(whole)
    assert json.loads((run_dir / "ledger.json").read_text()) == json.loads((whole / "ledger.json").read_text())


def test_the_pipeline_chains_the_stages(cluster: Cluster, chain: Chain) -> None:
    assert f"afterok:{chain.jobs[1]}" in chain.dependency
    for stage, job in enumerate(chain.jobs, start=1):
        ended, log, run_dir = cluster.wait(job), cluster.logs(job), chain.folder / f"stage{stage}"
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), log
        assert "1 ranks on node" in log and "done: 3 steps" in log
        assert (run_dir / "checkpoints" / "latest").read_text() == "step_000003\n"
        assert f"recipe: shapes/stage{stage}" in (run_dir / "config.yaml").read_text()
        progress = json.loads((run_dir / "run.json").read_text())
        assert (progress["step"], progress["steps"]) == (3, 3) and not (run_dir / "slurm").exists()


def test_a_stage_that_fails_cancels_those_after_it(cluster: Cluster, tmp_path: Path) -> None:
    """Only the job knows how many ranks there are: what does not fit them is found there, before they start."""
    words = [f"--output={tmp_path}/%j.log", *ONE, "shapes", "parallel.tensor=2", f"run_dir={tmp_path}/run"]
    said = cluster.ask("launch/pipeline.sh", *words)
    jobs = [int(number) for number in re.findall(r"^stage \d: job (\d+)", said, flags=re.MULTILINE)]
    ended = cluster.wait(jobs[0])
    log = cluster.logs(jobs[0])
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert log.count("\n") == 1 and log.startswith("error: ") and "parallel.tensor=2" in log
    assert [cluster.wait(job, timeout=30)["JobState"] for job in jobs[1:]] == ["CANCELLED", "CANCELLED"]


def test_a_typo_ends_at_once(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, TWO_BY_TWO, *words(shards, tmp_path / "run", "trainer.stepps=5"))
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.logs(job) == "error: no option trainer.stepps; did you mean trainer.steps?\n"
    assert not (tmp_path / "run").exists()


def test_a_dead_rank_is_tried_again_and_scancel_is_the_end(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, ONE_BY_TWO, *words(shards, run_dir, "trainer.steps=100000"))
    cluster.wait_until(lambda: steps_done(run_dir) >= 6, job)  # a checkpoint is there
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    cluster.start_now(job)
    requeued = cluster.logs(job)
    assert "failure number 1 there; requeued" in requeued, requeued

    cluster.wait_until(lambda: "going on from" in cluster.logs(job), job)
    cluster.ask("scancel", job)
    ended = cluster.wait(job)
    log = cluster.logs(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), log
    assert "requeued" not in log[len(requeued) :]


def test_elsewhere_it_says_where_to_go(cluster: Cluster, tmp_path: Path) -> None:
    script = runs.ROOT / "launch" / "stage2.sh"
    command = f"cd {tmp_path} && sbatch --parsable --output={tmp_path}/%j.log {' '.join(ONE)} {script}"
    job = int(cluster.ask("bash", "-c", command))
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert cluster.logs(job) == (
        f"error: {tmp_path} is not the project's folder: submit from there, or set VLM_NEMO_HOME to it\n"
    )


@pytest.mark.slow
def test_the_real_timer(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """Slurm's own signal: up to a minute before the time that --signal names."""
    run_dir = tmp_path / "run"
    options = [*ONE, "--time=2", "--signal=B:USR2@45"]
    job = submit(cluster, tmp_path, options, *words(shards, run_dir, "trainer.steps=100000"))
    cluster.wait(job, "RUNNING")
    cluster.start_now(job)
    assert re.search(r"stopped after step \d+; requeued", cluster.logs(job))
    cluster.ask("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
