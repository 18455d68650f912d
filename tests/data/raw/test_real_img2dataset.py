"""The real img2dataset fetches from a server on loopback; prepare reads it: every address accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests import runs
from tests.data.raw.web import fetch, web
from tests.data.raw_data import SPEC, picture
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.raw.img2dataset import list_downloads
from vlm_nemo.data.raw.unit import RawSample
from vlm_nemo.data.sample import BROKEN_IMAGE, EMPTY_CAPTION, IMAGE_SIZE, SampleError
from vlm_nemo.data.storage.shards import ShardFolder

pytestmark = pytest.mark.timeout(900)  # the first run installs img2dataset


def holed(data: bytes) -> bytes:
    """img2dataset's decoder fills what is missing and calls it a success."""
    return data[:900] + bytes(200) + data[1100:]


FILES = (
    {f"{i}.jpg": picture(i) for i in range(12)}
    | {
        "a.png": picture(20, form="PNG"),
        "b.webp": picture(21, form="WEBP"),
        "large.jpg": picture(22, (300, 200)),
        "silent.jpg": picture(23),  # its caption is empty
        "pixel.png": picture(24, (1, 1), "PNG"),
        "holed.jpg": holed(picture(25, (60, 60))),
        "page.html": b"<html>not found, but we say 200</html>",
        "broken.jpg": picture(26)[:20] + b"\0" * 500,
        "empty.jpg": b"",
        "cut.jpg": picture(28)[:700],
        "slow.jpg": picture(27),
    }
)
ARRIVED = 18
"""0 to 11, a, b, large, silent, pixel, holed"""
LOST = ("page.html", "broken.jpg", "empty.jpg", "cut.jpg", "slow.jpg", "gone.jpg")


FORMATS = {"tars": "webdataset", "files": "files"}
"""Folder -> what img2dataset calls the format."""


@pytest.fixture(scope="module")
def fetched(img2dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Fetches the addresses into a folder of that name; gives the folder's parent."""
    root = tmp_path_factory.mktemp("web")
    with web(FILES) as address:
        names = [*FILES, "gone.jpg"]
        table = {
            "URL": [f"{address}/{name}" for name in names],
            "TEXT": ["" if name == "silent.jpg" else f"a picture called {name}" for name in names],
            "similarity": [0.25 + i / 100 for i in range(len(names))],
            "LANGUAGE": ["en"] * len(names),
        }
        pyarrow.parquet.write_table(pyarrow.table(table), root / "list.parquet")
        kept = ["similarity", "LANGUAGE"]

        @cache
        def root_of(name: str) -> Path:
            formats = {name: FORMATS[name]}
            fetch(img2dataset, root / "list.parquet", root, formats, save_additional_columns=kept)
            return root

        yield root_of


@pytest.mark.parametrize("layout", ["tars", pytest.param("files", marks=pytest.mark.slow)])
def test_every_address_is_accounted_for(fetched: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
    (tmp_path / "manifest.yaml").write_text(f"sources: {{web: {{kind: img2dataset, path: {layout}}}}}")
    out = tmp_path / "out"
    manifest = str(tmp_path / "manifest.yaml")
    config = PrepareConfig(manifest=manifest, root=str(fetched(layout)), out=str(out), shard_samples=7, workers=1)
    done = prepare(config)["web"]
    assert ARRIVED + len(LOST) == len(FILES) + 1
    assert done["seen"] == ARRIVED
    assert done["dropped"] == {EMPTY_CAPTION: 1, IMAGE_SIZE: 1}
    folder = ShardFolder(out / "web")
    unused = []
    for number in range(len(folder)):
        name = folder.record(number).messages[1]["content"].removeprefix("a picture called ")
        assert name not in LOST
        (data,) = folder.images(number)
        if name.endswith(".jpg") and name != "large.jpg":
            assert data == FILES[name]  # skip_reencode: the bytes of the web
        try:
            assert decode_image(data, SPEC)[0].shape == (4, 3 * 16 * 16)
        except SampleError as error:
            unused.append((name, error.reason))
    assert len(folder) == ARRIVED - 2 and unused == [("holed.jpg", BROKEN_IMAGE)]


def test_facts_of_the_list(fetched: Callable[[str], Path]) -> None:
    samples = [raw for unit in list_downloads({"path": fetched("tars") / "tars"}, {}, 100, map) for raw in unit.read()]
    first = next(raw for raw in samples if isinstance(raw, RawSample) and str(raw.facts["url"]).endswith("/0.jpg"))
    assert first.facts["similarity"] == 0.25 and first.facts["language"] == "en"
    assert first.facts["original_width"] == 40 and len(str(first.facts["sha256"])) == 64


def test_a_model_is_trained_on_it(fetched: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "manifest.yaml").write_text("sources: {web: {kind: img2dataset, path: tars}}")
    out, run_dir = tmp_path / "out", tmp_path / "run"
    limits = ["max_bad_fraction=1", "workers=1"]
    runs.vlm_nemo(
        "prepare", tmp_path / "manifest.yaml", f"root={fetched('tars')}", f"out={out}", "tokenizer_vocab=270", *limits
    )
    words = [f"data.tokenizer={out}/tokenizer", f"data.sources.captions.path={out}/web", "data.max_bad_fraction=1"]
    steps = ["~data.sources.instruct", "trainer.steps=4", f"run_dir={run_dir}", "log.every=1"]
    runs.vlm_nemo("train", *runs.TINY, *words, *steps)
    losses = [line["loss"] for line in runs.metrics(run_dir)]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    ledger = json.loads((run_dir / "ledger.json").read_text())
    assert set(ledger["dropped"]["captions"]) == {BROKEN_IMAGE}  # holed.jpg, each time it came
    assert ledger["seen"] == ledger["used"] + sum(ledger["dropped"]["captions"].values())
