"""What `vlm-nemo check` says of data.vision_cache is what training then writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import runs, tiny
from vlm_nemo.check import features
from vlm_nemo.check.features import CacheSize, cache_size
from vlm_nemo.check.report import Finding
from vlm_nemo.config import CheckRoot, build, compose
from vlm_nemo.data.config import DataConfig, SourceConfig
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.overrides import translate
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import UserError
from vlm_nemo.verbs import check

FROZEN = OptimConfig(projector_lr=1e-3)


def test_size_of_prepared_data(shards: Path, tmp_path: Path) -> None:
    model = tiny.tiny_model()
    sources = {name: SourceConfig(path=str(shards / name)) for name in ("captions", "instruct")}
    data = DataConfig(sources=sources, vision_cache=str(tmp_path / "not" / "there"))
    found = cache_size(data, model, FROZEN, "bf16", there=True)
    images = sum(
        len(folder.sizes(i))
        for folder in (ShardFolder(str(shards / name)) for name in sources)
        for i in range(len(folder))
    )
    assert found.images == images > 100
    assert found.image_bytes == 4 * 16 * 2 and found.total == images * 4 * 16 * 2  # four patches of width 16 in bf16
    assert found.fits and not (tmp_path / "not").exists()
    assert cache_size(data, model, FROZEN, "fp32", there=False).image_bytes == 4 * 16 * 4
    with pytest.raises(UserError, match="vision_lr"):
        cache_size(data, model, OptimConfig(vision_lr=1e-3), "bf16", there=True)


def test_what_is_said() -> None:
    size = CacheSize(image_bytes=1_179_648, images=558_128, free=10**12, limit=5e11)
    assert size.fits and size.said("DIR") == (
        "data.vision_cache=DIR takes 1,179.6 kB an image, 658.39 GB for 558,128 images (less where some are the same); "
        "1,000 GB are free there; data.vision_cache_gb=500 keeps 76% of it, the tower computes the rest"
    )
    small = CacheSize(image_bytes=1_179_648, images=558_128, free=10**11, limit=5e11)
    assert not small.fits and "lower data.vision_cache_gb=500" in small.said("DIR")


def test_the_plan_says_it_and_fails_where_it_cannot_be(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*runs.TINY, *runs.data_words(shards), f"data.vision_cache={tmp_path}/cache", "optim.vision_lr=null"]
    asked = translate(words, CheckRoot, recipes=True)
    cfg = build(compose("check", CheckRoot, asked.overrides, asked.recipe), CheckRoot)
    plain = Finding(part="plan", ok=True, verdict="fits")
    *_, work = check._typical_row(cfg, there_is_data=True)
    assert work.kept, "no rank takes a share of a row's images"
    found = check._with_cache(cfg, plain, there_is_data=True)
    assert found.ok and "data.vision_cache" in found.notes[-1] and found.data["vision_cache"]["images"] > 100
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    found = check._with_cache(cfg, plain, there_is_data=True)
    assert not found.ok and "free more, name another disk" in found.verdict
