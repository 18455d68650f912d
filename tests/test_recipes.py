"""Every recipe composes, fits its hardware, and says what it is."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

from vlm_nemo.config import Config, build, compose
from vlm_nemo.parts import recipe_names
from vlm_nemo.runtime.layout import check_layout

ROOT = Path(__file__).parent.parent / "recipes"
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in sorted(ROOT.rglob("[!_]*.yaml"))]


def test_names() -> None:
    assert recipe_names() == NAMES
    assert {"shapes/stage0", "shapes/stage1", "shapes/stage2", "shapes/stage3"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_has_a_layout(name: str) -> None:
    cfg = build(compose("train", Config, recipe=name), Config)
    world = int(ranks[1]) if (ranks := re.search(r"launch/local.sh (\d+) train", header(name))) else 1
    check_layout(
        cfg.parallel,
        cfg.model,
        world_size=world,
        global_packs=cfg.data.global_packs,
        micro_packs=cfg.data.micro_packs,
        capacity=cfg.data.pack.capacity,
    )
    assert any((cfg.optim.vision_lr, cfg.optim.projector_lr, cfg.optim.language_lr)), "everything is frozen"
    assert cfg.optim.warmup_steps < cfg.trainer.steps
    assert cfg.data.sources and cfg.data.tokenizer
    assert cfg.recipe == name


@pytest.mark.parametrize("name", NAMES)
def test_header_says_command_hardware_expectation_and_date(name: str) -> None:
    assert f"train recipe={name}" in header(name)
    assert "Hardware:" in header(name) and "Expected:" in header(name)
    assert re.search(r"20\d\d-\d\d-\d\d", header(name))


@pytest.mark.parametrize("name", NAMES)
def test_is_overrides_only(name: str) -> None:
    content = yaml.safe_load((ROOT / f"{name}.yaml").read_text())
    assert set(content) <= {"defaults", *Config.__dataclass_fields__}
    assert "run_dir" not in content, "a run's folder follows from the recipe's name"


def test_the_shapes_stages_freeze_what_the_chain_says() -> None:
    rates = {}
    for stage in range(4):
        optim = build(compose("train", Config, recipe=f"shapes/stage{stage}"), Config).optim
        rates[stage] = [r is not None for r in (optim.vision_lr, optim.projector_lr, optim.language_lr)]
    assert rates == {
        0: [True, True, True],
        1: [False, True, False],
        2: [False, True, True],
        3: [True, True, True],
    }


@pytest.mark.parametrize("model", ["shapes", "llava15_7b"])
def test_each_stage_starts_from_the_one_before(model: str) -> None:
    for name in (n for n in NAMES if n.startswith(f"{model}/") and n[-1] > "1"):
        load = build(compose("train", Config, recipe=name), Config).checkpoint.load
        assert load is not None and load.endswith(f"stage{int(name[-1]) - 1}/checkpoints")


def test_composing_all_takes_little() -> None:
    started = time.process_time()
    for name in NAMES:
        compose("train", Config, recipe=name)
    assert time.process_time() - started < 5


def header(name: str) -> str:
    lines = (ROOT / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line)
    return "\n".join(comment)
