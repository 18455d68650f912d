"""The README's commands are the ones that CI runs, and its tree is the one that is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.prepare.manifest import read_manifest
from vlm_nemo.verbs.table import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def commands() -> list[str]:
    """Every line of the README's bash blocks that runs something of ours."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "git ", "cd ", "source "))]


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_ci_runs_it(command: str) -> None:
    runs = [line.strip() for line in CI.splitlines() if not line.lstrip().startswith("#")]
    alone = [line.removeprefix("run ").replace(" DEMO=short", "") for line in runs]
    assert command in alone, f"README has {command!r}; .ci/run does not run it"


def test_every_verb_is_there() -> None:
    for verb in VERBS:
        assert f"`{verb}`" in README


def test_the_tree_is_the_one_that_is_there() -> None:
    match = re.search(r"```text\nvlm_nemo/\n(.*?)```", README, flags=re.DOTALL)
    assert match is not None, "the README ends with the tree"
    folders: list[str] = []
    listed = set()
    for line in match[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2 - 1, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            listed.add("".join(folders) + name)
    there = {
        path.relative_to(ROOT / "vlm_nemo").as_posix()
        for path in (ROOT / "vlm_nemo").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert listed == there


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"`((?:tests|benchmarks)/[^`\s]*)`", README)
    assert len(named) > 10 and [path for path in named if not (ROOT / path).exists()] == []


def test_the_fill_is_the_benchmarks() -> None:
    said = re.search(r"fills rows of\s+(\d+) tokens to ([\d.]+) %", README)
    result = json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())
    assert said and result["claim"].startswith(f"Rows of {said[1]} filled to {said[2]} % or more")


def test_its_yaml_is_what_the_program_takes(tmp_path: Path) -> None:
    manifest, data = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "manifest.yaml").write_text(manifest)
    (source,) = read_manifest(tmp_path / "manifest.yaml")
    assert len(source.filter) == 5 and source.drop_duplicates
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), yaml.safe_load(data)["data"]))
    assert isinstance(cfg, DataConfig) and cfg.sources["instruct"].weight == 0.7 and cfg.micro_packs == 2
