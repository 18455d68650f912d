"""`vlm-nemo checkpoint`: lists, verifies and removes, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs
from vlm_nemo import cli
from vlm_nemo.train import manifest

CONFIG = """\
precision: bf16
parallel: {tensor: 2, pipeline: 1}
optim: {vision_lr: null, projector_lr: 0.001, language_lr: null}
"""


def make(folder: Path, step: int, *, frozen: Path | None = None, about: bool = True) -> Path:
    """A checkpoint of a few bytes; frozen: one that it shares its tower with."""
    final = folder / manifest.step_folder(step)
    draft = folder / manifest.draft_folder(step)
    (draft / "weights").mkdir(parents=True)
    (draft / "weights" / "projector_00000.safetensors").write_bytes(bytes([step % 256]) * 2_000_000)
    tower = draft / "weights" / "vision_00000.safetensors"
    if frozen:
        os.link(frozen / "weights" / "vision_00000.safetensors", tower)
    else:
        tower.write_bytes(b"v" * 3_000_000)
    (draft / "state.json").write_text(json.dumps({"step": step}))
    (draft / "config.yaml").write_text(CONFIG)
    layout = {"world": 4, "tensor": 2, "pipeline": 1, "data": 2}
    written = {"at": f"2026-11-21T10:{step:02d}:00+00:00", "layout": layout, "frozen": ["language", "vision"]}
    manifest.write_manifest(draft, (), written if about else None)
    manifest.publish(draft, final)
    return final


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10, 20, 30, 40 of one run; they share a tower."""
    first = make(tmp_path / "checkpoints", 10)
    for step in (20, 30, 40):
        make(tmp_path / "checkpoints", step, frozen=first)
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert cli.main(["checkpoint", *map(str, words)]) == code
    said = capsys.readouterr()
    return said.out + said.err


def steps(run: Path) -> list[int]:
    return [manifest.step_of(path) or 0 for path in manifest.newest(run / "checkpoints")]


def spoil(step_folder: Path) -> None:
    """A bit of it, which no size tells."""
    path = step_folder / "weights" / "projector_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spelled", [".", "checkpoints", "checkpoints/step_000040"])
def test_list_tells_what_there_is(run: Path, capsys: pytest.CaptureFixture[str], spelled: str) -> None:
    out = say(capsys, "list", run / spelled)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "sizes fit" in line]
    at = ["40", "2026-11-21 10:40", "5.00 MB", "3.00 MB", "4 ranks: tensor 2, data 2", "bf16", "language vision"]
    assert rows[0] == [*at, "sizes fit"]
    assert [row[0] for row in rows] == (["40"] if "step" in spelled else ["40", "30", "20", "10"])
    if "step" not in spelled:
        assert "4 checkpoints take 11.00 MB on the disk" in out


def test_an_older_checkpoint_is_told_of_by_its_configuration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(run / "checkpoints", 50, about=False)
    (run / "checkpoints" / ".step_000060.draft").mkdir()
    out = say(capsys, "list", run)
    row = next(line for line in out.splitlines() if "│   50 │" in line)
    assert "tensor 2" in row and "vision language" in row and "bf16" in row
    assert ".step_000060.draft: left by" in out
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    assert "checkpoint of format 1" in " ".join(say(capsys, "list", run / "checkpoints").split())


def test_verify_reads_every_byte(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: (read.append(path.name), real(path))[1])
    assert say(capsys, "verify", run).count("intact") == 4
    assert read.count("vision_00000.safetensors") == 1 and read.count("projector_00000.safetensors") == 4
    spoil(run / "checkpoints" / "step_000030")
    assert "damaged" not in say(capsys, "list", run)
    out = say(capsys, "verify", run, code=2)
    assert "error: 1 of 4 checkpoints are damaged: step_000030: damaged: weights/projector_00000.safetensors" in out
    (run / "checkpoints" / "step_000040" / "weights" / "vision_00000.safetensors").unlink()
    assert "damaged: weights/vision_00000.safetensors" in say(capsys, "list", run)
    assert "2 of 4" in say(capsys, "verify", run, code=2)


def test_prune_says_before_it_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = say(capsys, "prune", run, "keep=1", "every=20")
    assert "2 would go and free 4.00 MB" in out and steps(run) == [40, 30, 20, 10]
    assert "removed 2, which freed 4.00 MB" in say(capsys, "prune", run, "keep=1", "every=20", "yes=true")
    assert steps(run) == [40, 20]
    assert "nothing to remove" in say(capsys, "prune", run, "yes=true")
    assert say(capsys, "verify", run).count("intact") == 2, "what they shared with the removed ones is still theirs"


def test_prune_never_takes_the_newest_intact_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is found by its bytes: the newer ones look well and are not."""
    for step in (40, 30):
        spoil(run / "checkpoints" / f"step_0000{step}")
    out = say(capsys, "prune", run, "keep=1", "yes=true")
    assert "the newest intact one" in out and steps(run) == [40, 30, 20]
    spoil(run / "checkpoints" / "step_000020")
    assert "is intact, so nothing is removed" in say(capsys, "prune", run, "keep=1", "yes=true", code=2)
    assert steps(run) == [40, 30, 20]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["list", "nowhere"], "no checkpoint at nowhere: give a run's folder"),
        (["prune", ".", "keep=0"], "keep=0: at least the newest stays"),
        (["prune", "checkpoints/step_000040"], "is one checkpoint; prune takes a run's folder"),
        (["lost", "."], "action must be"),
        (["list"], "dir is not set: A run's folder"),
        (["list", ".", "again"], "cannot read 'again': expected key=value"),
    ],
)
def test_refusals(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    monkeypatch.chdir(run)
    out = say(capsys, *words, code=2)
    assert line in out and out.startswith("error: ")


def test_it_needs_no_torch(run: Path) -> None:
    code = "import sys; from vlm_nemo import cli; code = cli.main(); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "checkpoint", "list", run], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert steps(run) == [40, 30, 20, 10]
