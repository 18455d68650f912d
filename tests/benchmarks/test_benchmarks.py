"""Every benchmark runs, compares like with like, and says what it measured."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.loader import PLACEHOLDERS, make, spoken, theirs
from benchmarks.made import SOURCE, conversations, prepared
from benchmarks.packers import METHODS
from benchmarks.packing import measure, mixes
from benchmarks.paired import Paired, compare, ratio_of_sums
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.tokenizer import Tokenizer

NAMES = ("checkpoint", "decode", "records", "loader", "packing", "peers_cpu", "step", "features", "fusing")
SLOW = ("features", "fusing")


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """What a benchmark silences stays silent until its process ends; here others follow."""
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES]
)
def test_it_runs_and_writes_its_results(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--stages", "2"] if name in ("step", *SLOW) else []
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--results", str(tmp_path), *stages])
    assert "ours" in capsys.readouterr().out or name in ("loader", "step", *SLOW)
    found = json.loads((tmp_path / ("step_cpu.json" if name == "step" else f"{name}.json")).read_text())
    assert found["command"] == f"python -m benchmarks.{name} --quick"
    assert found["claim"] and found["figure"] and found["rows"] and found["date"] and found["packages"]
    assert "cores" in found["hardware"] and "/" not in found["hardware"]
    if name in ("packing", "peers_cpu"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    if name == "peers_cpu":  # both sides computed the same thing
        assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-4)
        assert [row["fill of ours, %"] > row["fill of theirs, %"] for row in found["rows"]] == [True, True]
    if name == "features":  # the images were seen before
        assert found["rows"][0]["rows from the cache, %"] > 0
    if name == "step":
        (run,) = found["runs"]
        assert run["tokens_per_s"] > 0 and run["mfu"] is None and 0 < run["tflops"] < run["matmul_tflops"]
        assert run["tflop_by_part"]["language"] > run["tflop_by_part"]["vision"] > 0 and run["images"] > 0
        assert run["memory_bytes"] > 1e6 and all(np.isfinite(run["losses"]))


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_compared(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--quick" in out and "--results" in out and len(out.splitlines()) > 12


def test_quick_leaves_the_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    given = {"claim": "c", "figure": "f", "rows": [{"a": 1}], "packages": ("numpy",)}
    report.save(SimpleNamespace(quick=True, results=None), "records", **given)
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text(report.README.read_text())
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.save(SimpleNamespace(quick=False, results=None), "records", **given)
    assert "| c | f | `python -m benchmarks.records` |" in (tmp_path / "README.md").read_text()


def test_the_table_is_that_of_the_results() -> None:
    readme = report.README.read_text()
    assert report.with_table(readme, report.RESULTS) == readme
    assert {path.stem for path in report.RESULTS.glob("*.json")} <= {*NAMES, "step_cpu"}


def test_pairs_alternate_and_the_ratio_is_found() -> None:
    order: list[str] = []
    rng = np.random.default_rng(0)

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds * rng.lognormal(0, 0.05)

    found = compare(lambda: side("A", 1.0), lambda: side("B", 3.0), 60)
    assert "".join(order[2:10]) == "ABBAABBA"
    ratio, low, high = found.ratio()
    assert low < 3 < high and low < ratio < high and high - low < 0.2
    assert Paired([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).ratio() == (2.0, 2.0, 2.0)
    assert Paired([1.0, 2.0], [4.0, 4.0]).rates(6) == (4.0, 1.5)


def test_runs_of_unlike_work_are_summed() -> None:
    found = ratio_of_sums([(1.0, 1), (5.0, 3)], [(2.0, 1), (28.0, 4)])
    assert found == pytest.approx((4.0, 2.0, 4.2)), "both pairs; the first alone; the second alone"


@given(st.lists(st.integers(1, 100), max_size=200), st.sampled_from(sorted(METHODS)))
@settings(deadline=None, max_examples=100)
def test_every_way_of_packing_is_sound(lengths: list[int], name: str) -> None:
    arrived = 0
    seen: set[int] = set()
    for row in METHODS[name](lengths, 100):
        assert row.items and seen.isdisjoint(row.items) and max(row.items) < row.arrived <= len(lengths)
        assert arrived <= row.arrived and sum(lengths[i] for i in row.items) <= row.places
        arrived = row.arrived
        seen |= set(row.items)


def test_known_fills() -> None:
    # A row of 100 holds a 60 and a 40, never two of 60; next-fit: 60 | 60 | 60 40 | 40 40 | …
    lengths = [60, 60, 60, 40, 40, 40] * 400
    fills = {name: measure(method, lengths, 100)["fill"] for name, method in METHODS.items()}
    assert fills["next-fit"] == pytest.approx(0.75, abs=0.01)
    assert fills["padded, as they come"] == pytest.approx(50 / 60, abs=0.01)
    for name in ("subset sum, pool 64 (ours)", "first-fit decreasing, 1024", "best-fit, 64 open rows"):
        assert fills[name] > 0.99
    assert {name: len(found) for name, found in mixes(50).items()} == dict.fromkeys(
        ("instruct", "recaption", "captions", "mixed"), 50
    )


def test_both_loaders_supervise_the_same_tokens(tmp_path: Path) -> None:
    out = make(tmp_path, 48)
    tokenizer, folder = Tokenizer(out / "tokenizer"), ShardFolder(str(out / SOURCE))
    ours = 0
    for number in range(len(folder)):
        record = folder.record(number)
        text = encode_conversation(record.messages, tokenizer, TEMPLATES["vicuna"], [plain(PLACEHOLDERS)])
        ours += sum(label != -100 for label in text.labels)
        if number == 0:
            again = tokenizer.decode(text.tokens)
            assert spoken(record.messages).replace("<s>", "").replace("</s>", "").replace("<image>", "") == again
    # The stream shuffles within a pass: three batches of 16 are the whole data set
    batches = list(islice(theirs(out), 3))
    assert [batch.samples for batch in batches] == [16] * 3
    assert sum(batch.supervised for batch in batches) == ours


def test_made_data_is_prepared_data(tmp_path: Path) -> None:
    texts = conversations(np.random.default_rng(0), [3, 7])
    folder = ShardFolder(str(prepared(tmp_path, [(40, 30)], texts, pictures=1) / SOURCE))
    record = folder.record(1)
    assert record.sizes == [(40, 30)] and record.messages[1]["content"] == texts[1][1]
    assert len(texts[1][1].split()) == 7
