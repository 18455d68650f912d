"""What is said of a training before it begins is what its loader does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.data.raw_data import SPEC, data_config, make_prepared, write_all_lengths
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import LayoutConfig, PackConfig, SourceConfig
from vlm_nemo.data.lengths import fingerprint
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.prepare.measure import sample_sizes
from vlm_nemo.data.prepare.rehearsal import RANKS, rehearse
from vlm_nemo.data.tokenizer import Tokenizer


def sizes(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def test_samples_that_fill_a_row_each_wait_for_the_pool() -> None:
    found = rehearse(sizes(*[(100, 7)] * 500), 100, pool=10)
    assert found is not None and found.delay == 9
    assert found.balance == {1: 1.0, 4: 1.0}


def test_more_rows_a_rank_are_shared_out_more_evenly() -> None:
    """A row is a sample, every other one has an image: the busiest of 8 ranks has an eighth of all, rounded up."""
    found = rehearse(sizes(*[(100, 5), (100, 0)] * 4000), 100)
    assert found is not None
    for rows, balance in found.balance.items():
        drawn = rows * RANKS
        busiest = sum(math.comb(drawn, n) / 2**drawn * math.ceil(n / RANKS) for n in range(drawn + 1))
        assert balance == pytest.approx(busiest / (rows / 2), rel=0.03), rows
    assert found.balance[4] < 1.3 < found.balance[1]


def test_without_images_or_samples() -> None:
    found = rehearse(sizes(*[(10, 0)] * 20), 100)
    assert found is not None and set(found.balance.values()) == {1.0}
    assert rehearse(sizes((101, 1), (0, 1)), 100) is None
    assert rehearse(sizes(), 100) is None


def test_the_loader_reports_about_the_same(tmp_path: Path) -> None:
    """Another order of the same samples: its delays and balance are near those that were foretold."""
    prepared = make_prepared(tmp_path, captions=5)
    write_all_lengths(prepared)
    manifest = json.loads((prepared / "instruct" / "manifest.json").read_text())
    tokenizer = Tokenizer(prepared / "tokenizer")
    measured = fingerprint(tokenizer, TEMPLATES["short"], LayoutConfig())
    drawn = sample_sizes(prepared / "instruct", manifest, measured, SPEC, 1000)
    assert len(drawn) == 80 and set(drawn[:, 1].tolist()) == {0, 4, 8}  # text, one image, two
    foretold = rehearse(drawn, 64, pool=16)
    sources = {"instruct": SourceConfig(path=str(prepared / "instruct"))}
    cfg = data_config(prepared, sources=sources, pack=PackConfig(capacity=64, pool=16), global_packs=RANKS, threads=0)
    loader = Loader(cfg, SPEC, tokenizer, seed=1, dp_rank=0, dp_size=RANKS, max_tokens=64)
    steps = [loader.next() for _ in range(40)]
    loader.close()
    assert foretold is not None
    assert foretold.balance[1] == pytest.approx(np.mean([step.vision_balance for step in steps]), rel=0.1)
    assert foretold.delay == pytest.approx(max(step.delay for step in steps), rel=0.4)
