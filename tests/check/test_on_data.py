"""The parts that read the recipe's own data, on a small prepared set; and the verb as a person runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs, warm
from vlm_nemo import cli
from vlm_nemo.check import dry as dries
from vlm_nemo.check import leaks as leaking
from vlm_nemo.check.audit import audit, vision_balance
from vlm_nemo.check.dry import judged, one_step, reader
from vlm_nemo.check.labels import label_faults
from vlm_nemo.check.report import Finding
from vlm_nemo.check.sources import absent, spoken_samples
from vlm_nemo.config import Config, build, compose
from vlm_nemo.data import pieces
from vlm_nemo.data.sources import open_sources, template_of
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.layout import spec_of
from vlm_nemo.overrides import translate
from vlm_nemo.train import step
from vlm_nemo.types import UserError


def config(shards: Path, *words: str) -> Config:
    asked = translate([*runs.TINY, *runs.data_words(shards), *words], Config, recipes=True, positional=())
    return build(compose("train", Config, asked.overrides, asked.recipe), Config)


def audited(cfg: Config, samples: int = 200, replicas: int = 2) -> Finding:
    sources = open_sources(cfg.data, spec_of(cfg.model), Tokenizer(cfg.data.tokenizer), seed=cfg.seed)
    return audit(sources, samples=samples, max_tokens=cfg.model.language.max_positions, replicas=replicas)


def test_the_audit_counts_and_advises(shards: Path) -> None:
    found = audited(config(shards))
    assert found.ok and found.data["samples"] >= 200 and found.data["dropped"] == {}
    assert 0.9 < found.data["fill"] <= 1 and found.data["vision_balance"] >= 1
    assert f"{found.data['samples']:,} samples in {found.data['rows']:,} rows" in found.verdict


def test_samples_that_do_not_fit_fail_the_audit(shards: Path) -> None:
    found = audited(config(shards, "data.pack.capacity=40", "data.min_samples_before_stop=10"))
    assert not found.ok and "have to be left out, data.max_bad_fraction is 1.0%" in found.verdict
    assert any(key.endswith(": too long") for key in found.data["dropped"])


def test_the_recipes_labels_are_its_answers(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(shards)

    def faults() -> list[str]:
        sources = open_sources(cfg.data, spec_of(cfg.model), Tokenizer(cfg.data.tokenizer), seed=cfg.seed)
        spoken = spoken_samples(sources, 50)
        assert len(spoken) == 50
        return label_faults(spoken, sources.encoder.tokenizer, sources.encoder.template)

    assert faults() == []
    real = pieces.Writer._put
    monkeypatch.setattr(pieces.Writer, "_put", lambda self, ids, supervised: real(self, ids, True))
    assert len(faults()) == 50


def test_what_is_not_here_is_named(shards: Path, tmp_path: Path) -> None:
    cfg = config(shards)
    assert absent(cfg.data) is None
    gone = replace(cfg.data.sources["captions"], path=str(tmp_path / "gone"))
    moved = replace(cfg.data, sources=cfg.data.sources | {"captions": gone})
    assert absent(moved) == f"data.sources.captions.path={tmp_path}/gone is not here"
    assert absent(replace(cfg.data, tokenizer="nowhere")) == "data.tokenizer=nowhere is not here"
    with pytest.raises(UserError, match="data.template=vicunna is unknown"):
        template_of(replace(cfg.data, template="vicunna"))


def stepped(cfg: Config) -> Finding:
    return judged(one_step(cfg.model, cfg.data, cfg.optim, cfg.seed), cfg.data)


def test_a_dry_step_takes_the_recipes_rows(shards: Path) -> None:
    cfg = config(shards, "optim.vision_lr=null")
    assert spec_of(reader(cfg.model)) == spec_of(cfg.model)
    found = stepped(cfg)
    assert found.ok, found
    assert found.data["images"] > 0 and found.data["supervised"] > 0
    assert [row[1] for row in found.tables[0].rows] == ["frozen", "yes", "yes"]


@pytest.mark.parametrize("warmup", [0, 2000])
def test_a_dry_step_learns_at_the_peak_whatever_leads_there(warmup: int, shards: Path) -> None:
    found = stepped(config(shards, f"optim.warmup_steps={warmup}", "optim.min_lr_ratio=0"))
    assert found.ok and [row[4] for row in found.tables[0].rows] == ["yes"] * 3, found


def _lost_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.token_loss
    monkeypatch.setattr(
        step, "token_loss", lambda losses, loss_mask: real(losses, loss_mask * (loss_mask.cumsum(-1) > 1))
    )


def _not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.train_step

    def moving(model: Any, *given: Any) -> Any:
        result = real(model, *given)
        with torch.no_grad():
            model[0].module.vision.patch_weight += 1
        return result

    monkeypatch.setattr(step, "train_step", moving)


def _nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "train_step", _without_projector(step.train_step))


def _without_projector(real: Callable[..., Any]) -> Callable[..., Any]:
    def stepping(model: Any, *given: Any) -> Any:
        for parameter in model[0].module.projector.parameters():
            parameter.register_hook(lambda gradient: gradient * 0)
        return real(model, *given)

    return stepping


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_lost_tokens, "labels"),
        (_not_frozen, "vision is frozen and changed"),
        (_nothing_learnt, "projector is to learn and its gradient is zero"),
    ],
)
def test_what_a_dry_step_finds(
    fault: Callable[[pytest.MonkeyPatch], None], said: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = stepped(config(shards, "optim.vision_lr=null"))
    assert not found.ok and said in found.verdict


def test_rows_are_no_longer_than_logits_allow(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(shards)
    monkeypatch.setattr(dries, "LOGITS", 0)
    capacity = dries.shortened(cfg.data, reader(cfg.model), cfg.seed).pack.capacity
    assert capacity % 64 == 0 and 0 < capacity < cfg.data.pack.capacity


def test_balance_is_of_whole_steps() -> None:
    found = dries_found([[3, 1], [2, 2]])
    assert vision_balance(found, 2) == pytest.approx((6 / 4 + 4 / 4) / 2)
    assert vision_balance(found, 3) is None


def dries_found(steps: list[list[int]]) -> Any:
    from vlm_nemo.check.audit import Found
    from vlm_nemo.data.encode import PlannedSample

    return Found(steps=[[[PlannedSample(0, "a", 0, 0, 1, cost, None)] for cost in step] for step in steps])


def test_the_verb_passes_a_sound_recipe(shards: Path, tmp_path: Path) -> None:
    """As a person starts it; a part that computes starts a process of its own."""
    words = [*runs.TINY, *runs.data_words(shards), "check.parts=[data,dry]", "check.samples=100"]
    done = runs.vlm_nemo("check", *words, f"check.out={tmp_path}", fresh=True)
    assert f"wrote {tmp_path}/report.html" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(one["part"], one["ok"], one["skipped"]) for one in report] == [("data", True, False), ("dry", True, False)]
    page = (tmp_path / "report.html").read_text()
    assert "<h2 id=dry>" in page and "data:image/png;base64," in page


def test_the_verb_looks_for_leaks(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaking, "run_ranks", partial(leaking.run_ranks, context=warm.context()))
    words = [*runs.TINY, *runs.data_words(shards), "check.parts=[leaks]", f"check.out={tmp_path}"]
    assert cli.main(["check", *words]) == 0
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert (report["part"], report["ok"], report["skipped"]) == ("leaks", True, False)


def test_the_verb_says_what_fails_and_what_it_did_not_see(tmp_path: Path) -> None:
    words = ["recipe=shapes/stage1", "check.parts=[plan,data]", "check.memory_gib=0.001", "check.reserve_gib=0"]
    nowhere = [f"data.tokenizer={tmp_path}/none", "check.world=1", f"check.out={tmp_path}/out"]
    done = runs.vlm_nemo("check", *words, *nowhere, code=2)
    assert "check of shapes/stage1 failed: plan" in done.stderr
    plan, data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not plan["ok"] and data["skipped"] and "is not here" in data["verdict"]
    assert "no data to look at, so every sample has an image of 1024 x 768" in plan["notes"][0]
