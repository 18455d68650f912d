"""Duplicates: found by the images' bytes, passed over, counted, and never in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.raw_data import picture, turns, write_img2dataset, write_llava
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare import duplicates
from vlm_nemo.data.prepare.duplicates import count_copies, find_duplicates
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.sample import DUPLICATE, FILTERED, ShardImage, ShardSample
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.storage.write import write_shard


def write_images(folder: Path, records: list[list[int]], per_shard: int = 3) -> list[Path]:
    """Records whose images are one byte each: equal numbers, equal images."""
    tars = []
    for first in range(0, len(records), per_shard):
        tar = folder / f"{first:05d}.tar"
        samples = []
        for i, images in enumerate(records[first : first + per_shard], first):
            encoded = [ShardImage(bytes([image]), "jpg", 16, 16) for image in images]
            samples.append(ShardSample(str(i), [{"role": "user", "content": "x"}], None, f"r{i}", encoded))
        write_shard(tar, samples)
        tars.append(tar)
    return tars


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=14),
    st.sampled_from([1, 3, 1 << 24]),
)
def test_a_record_is_a_duplicate_if_its_images_were_seen_in_that_order(
    tmp_path_factory: pytest.TempPathFactory, records: list[list[int]], part: int
) -> None:
    tars = write_images(tmp_path_factory.mktemp("shards"), records)
    seen: dict[tuple[int, ...], int] = {}
    expected = [(i, seen.setdefault(tuple(r), i)) for i, r in enumerate(records) if r]
    expected = [(i, first) for i, first in expected if i != first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "PART", part)
        found = find_duplicates(tars, len(records))
    assert list(zip(found.records.tolist(), found.firsts.tolist(), strict=True)) == expected
    assert found.images == sum(len(records[i]) for i, _ in expected)


def test_copies_within_and_across_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"a": [[1], [2], [1, 2], [3]], "b": [[3], [9], [3, 1]], "c": [[7], []]}
    tars = {}
    for name, records in sources.items():
        (tmp_path / name).mkdir()
        tars[name] = write_images(tmp_path / name, records)
    images = {name: sum(map(len, records)) for name, records in sources.items()}
    found = count_copies(tars, images)
    assert found.within == {"a": 2, "b": 1, "c": 0} and found.across == {("a", "b"): 2} and found.thinned == 1
    monkeypatch.setattr(duplicates, "PART", 4)
    thinned = count_copies(tars, images)
    assert thinned.thinned == 4 and all(n % 4 == 0 for n in thinned.within.values())


def config(folder: Path, source: str, **changes: Any) -> PrepareConfig:
    (folder / "manifest.yaml").write_text(f"sources: {{a: {source}}}")
    given = {"manifest": str(folder / "manifest.yaml"), "out": str(folder / "out"), "shard_samples": 3, "workers": 1}
    return PrepareConfig(**(given | changes))


def test_prepare_passes_duplicates_over_and_accounts_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [1, 2, 1, 3, 2, 2, 4]
    write_img2dataset(
        tmp_path / "raw", [[{"jpg": picture(i), "txt": f"caption {n}".encode()} for n, i in enumerate(images)]]
    )
    both = "{kind: img2dataset, path: raw, drop_duplicates: true}"
    done = prepare(config(tmp_path, both))["a"]
    assert done["seen"] == 7 and done["records"] == done["images"] == 4 and done["dropped"] == {DUPLICATE: 3}
    assert done["excluded"]["examples"][0] == "00000.tar/000000002: as 00000.tar/000000000"
    folder = ShardFolder(tmp_path / "out" / "a")
    kept = [folder.record(i).messages[1]["content"] for i in range(len(folder))]
    assert kept == ["caption 0", "caption 1", "caption 3", "caption 6"]
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert (ledger["seen"], ledger["used"], ledger["dropped"]) == (7, 4, {"a": {DUPLICATE: 3}})

    stamp = (tmp_path / "out" / "a" / "excluded.safetensors").stat().st_mtime_ns
    assert prepare(config(tmp_path, both))["a"] == done
    assert (tmp_path / "out" / "a" / "excluded.safetensors").stat().st_mtime_ns == stamp
    every = prepare(config(tmp_path, "{kind: img2dataset, path: raw}"))["a"]
    assert every["records"] == 7 and every["dropped"] == {} and len(ShardFolder(tmp_path / "out" / "a")) == 7
    assert "3 of 3 shards reused" in (said := capsys.readouterr().err) or said.count("reused as it was") == 2


def test_one_image_asked_twice_stays_where_nobody_asked(tmp_path: Path) -> None:
    rows = [{"image": "0.jpg", "conversations": turns("<image>", answer)} for answer in ("red", "blue")]
    write_llava(
        tmp_path, [*rows, {"conversations": turns("Say red.", "red")}, {"conversations": turns("Say red.", "red")}]
    )
    source = "{kind: llava, json: instruct.json, images: images%s}"
    assert prepare(config(tmp_path, source % ""))["a"]["records"] == 4
    assert prepare(config(tmp_path, source % ", drop_duplicates: true"))["a"]["records"] == 3  # texts are none


def test_filters_count_as_wanted_and_change_what_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [(40, 30), (100, 80), (64, 64), (300, 60), (90, 90)]
    texts = ["one two three", "one", "one two three", "one two three", "one two"]
    write_img2dataset(
        tmp_path / "raw",
        [[{"jpg": picture(i, s), "txt": t.encode()} for i, (s, t) in enumerate(zip(sizes, texts, strict=True))]],
    )
    source = "{kind: img2dataset, path: raw, filter: {min_side: 50, max_aspect: 2, min_words: %d}}"
    strict = {"max_bad_fraction": 0.0, "min_samples_before_stop": 1}
    done = prepare(config(tmp_path, source % 2, **strict))["a"]
    assert done["records"] == 2 and done["dropped"] == {FILTERED: 3} and done["seen"] == 5
    assert done["filtered"] == {"max_aspect=2": 1, "min_side=50": 1, "min_words=2": 1}
    assert done["shards"][0]["filtered"]["min_side=50"]["examples"] == [
        "00000.tar/000000000: side 30, wanted min_side=50"
    ]
    done = prepare(config(tmp_path, source % 3, **strict))["a"]
    assert done["records"] == 1 and "0 of 2 shards reused" in capsys.readouterr().err
    folder = ShardFolder(tmp_path / "out" / "a")
    assert folder.sizes(0) == [(64, 64)] and len(folder) == 1
    assert np.diff([0, *(shard["records"] for shard in done["shards"])]).tolist() == [1, -1]  # an empty shard is one
