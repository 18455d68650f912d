"""A run that goes on keeps its cut where that fits, and cuts anew where it does not; what it tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from tests import tiny
from vlm_nemo.config import Config
from vlm_nemo.model.stages import Work
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.verbs.cut import _told, cut_of_checkpoint


def test_the_cut_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"parallel": {"pipeline": 2, "layers": [1, 3]}}))
    cfg = Config(model=tiny.tiny_model(), parallel=ParallelConfig(pipeline=2))
    assert cut_of_checkpoint(cfg, tmp_path) == [1, 3]
    cfg.parallel.virtual = 2
    assert cut_of_checkpoint(cfg, tmp_path) == []
    cfg.parallel.virtual, cfg.model.language.num_layers = 1, 5
    assert cut_of_checkpoint(cfg, tmp_path) == []
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert cut_of_checkpoint(cfg, tmp_path) == []


def test_what_is_told_of_images() -> None:
    """With data.vision_cache nothing is shared out, and nothing else is said."""
    parallel = ParallelConfig(tensor=2, vision=1)
    cfg = Config(model=tiny.tiny_model(), parallel=parallel)
    work = Work(lengths=(40,), grids=(((2, 2), (2, 2)),), supervised=8)
    (line,) = _told(cfg, parallel, work)
    assert line.startswith("vision: 2 ranks share out the images of a row, the busiest does 1.00 x the mean")
    kept = _told(cfg, parallel, replace(work, kept=True))
    assert kept == ["vision: with data.vision_cache each of 2 ranks embeds all images of a row"]
