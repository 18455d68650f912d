"""Imports go downwards only; what answers quickly imports nothing heavy. The contracts are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def copy(folder: Path) -> None:
    for path in ["pyproject.toml", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("vlm_nemo/**/*.py"))]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text((ROOT / path).read_text())


def test_the_floors_hold() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_an_import_upwards_is_caught(tmp_path: Path) -> None:
    copy(tmp_path)
    with (tmp_path / "vlm_nemo" / "data" / "config.py").open("a") as file:
        file.write("\nfrom vlm_nemo.train.config import OptimConfig  # noqa\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "vlm_nemo.data.config -> vlm_nemo.train.config" in result.stdout


def test_a_new_floor_must_be_listed(tmp_path: Path) -> None:
    copy(tmp_path)
    (tmp_path / "vlm_nemo" / "cellar.py").write_text('"""A floor that nobody listed."""\n')
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "vlm_nemo.cellar" in result.stdout
