"""A run that goes on keeps its cut where that fits, and cuts anew where it does not."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests import tiny
from vlm_nemo.config import Config
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.verbs.cut import cut_of_checkpoint


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
