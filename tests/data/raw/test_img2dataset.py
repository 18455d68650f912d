"""img2dataset's layouts, made by hand: facts, what never arrived, what was cut off."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.raw_data import picture, write_img2dataset
from vlm_nemo.data.raw.img2dataset import DownloadUnit, list_downloads
from vlm_nemo.data.raw.unit import RawDrop, RawSample
from vlm_nemo.data.sample import BROKEN_IMAGE, MISSING_IMAGE
from vlm_nemo.types import UserError

PAIR = {"jpg": picture(1), "txt": b"a red circle"}


def write_parquet(path: Path, keys: list[str], failed: int = 0, **columns: list[Any]) -> None:
    """A row a key that arrived, then rows of addresses that did not."""
    rows = len(keys) + failed
    table: dict[str, list[Any]] = {
        "url": [f"http://h/{row}" for row in range(rows)],
        "caption": ["from the parquet"] * rows,
        "key": [*keys, *(f"x{row}" for row in range(failed))],
        "status": ["success"] * len(keys) + ["failed_to_download"] * failed,
        "error_message": [None] * len(keys) + ["HTTP Error 404"] * failed,
        **columns,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def units(folder: Path, shard_samples: int = 4) -> list[DownloadUnit]:
    return list_downloads({"path": folder}, {}, shard_samples, map)


def read(folder: Path) -> list[RawSample | RawDrop]:
    return [raw for unit in units(folder) for raw in unit.read()]


def as_files(folder: Path) -> None:
    """Unpack the tars into the layout of output_format=files."""
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as archive:
            archive.extractall(folder / tar.stem, filter="data")
        tar.unlink()


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_facts_come_from_the_parquet_and_the_json(tmp_path: Path, layout: str) -> None:
    said = {"key": "000000001", "caption": "c", "similarity": 0.1, "width": 40, "exif": "{}", "list": [1]}
    write_img2dataset(tmp_path, [[PAIR, PAIR | {"json": json.dumps(said).encode()}]])
    laion = {
        "similarity": [0.31, 0.32, 0.4],
        "LANGUAGE": ["en", "de", "nl"],
        "punsafe": [0.01, float("nan"), 0.9],
        "NSFW": ["UNLIKELY", None, "NSFW"],
        "LICENSE": ["?", "?", "?"],
    }
    write_parquet(tmp_path / "00000.parquet", ["000000000", "000000001"], failed=1, **laion)
    if layout == "files":
        as_files(tmp_path)
    first, second = read(tmp_path)
    assert isinstance(first, RawSample) and isinstance(second, RawSample)
    assert first.facts == {
        "url": "http://h/0", "similarity": 0.31, "language": "en", "punsafe": 0.01, "nsfw": "UNLIKELY", "license": "?",
        "width": 40.0, "height": 30.0, "sha256": "0" * 64,
    }  # fmt: skip
    assert second.facts == {
        "url": "http://h/1", "similarity": 0.32, "language": "de", "license": "?", "width": 40.0
    }  # fmt: skip
    assert first.messages[1]["content"] == "a red circle"
    assert first.name == ("00000.tar/000000000" if layout == "webdataset" else "00000/000000000")


def test_without_a_parquet_the_json_speaks(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, [[PAIR]])
    (sample,) = read(tmp_path)
    assert isinstance(sample, RawSample) and sample.facts["url"] == "http://h/000000000"


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_both_layouts_give_the_same_samples(tmp_path: Path, layout: str) -> None:
    bad = [PAIR | {"jpg": b"<html>"}, {"txt": b"no picture"}, PAIR]
    write_img2dataset(tmp_path, [[PAIR] * 3 + bad, [PAIR]])
    if layout == "files":
        as_files(tmp_path)
    assert [unit.count for unit in units(tmp_path)] == [4, 2, 1]
    reasons = [raw.reason if isinstance(raw, RawDrop) else None for raw in read(tmp_path)]
    assert reasons == [None, None, None, BROKEN_IMAGE, MISSING_IMAGE, None, None]


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_fewer_samples_than_arrived(tmp_path: Path, layout: str) -> None:
    """Cut between two members and closed again: the tar alone looks whole."""
    write_img2dataset(tmp_path, [[PAIR] * 3])
    write_parquet(tmp_path / "00000.parquet", [f"00000{i:04d}" for i in range(5)], failed=2)
    if layout == "files":
        as_files(tmp_path)
    with pytest.raises(UserError, match=r"holds 3 samples, 00000\.parquet says that 5 arrived"):
        units(tmp_path)


def test_a_tar_that_is_gone_is_missed(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, [[PAIR]])
    write_parquet(tmp_path / "00001.parquet", ["a", "b"])
    with pytest.raises(UserError, match=r"00001\.parquet names 2 images that arrived, .*00001\.tar is missing"):
        units(tmp_path)


def test_other_parquets_do_not_matter(tmp_path: Path) -> None:
    """The list of addresses that img2dataset was given may lie in the same folder; a shard may have lost all."""
    write_img2dataset(tmp_path, [[PAIR]])
    pyarrow.parquet.write_table(pyarrow.table({"URL": ["http://h/1"], "TEXT": ["a"]}), tmp_path / "laion.parquet")
    write_parquet(tmp_path / "00001.parquet", [], failed=3)
    assert len(read(tmp_path)) == 1


def test_an_interrupted_download_is_named(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, [[PAIR]])
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"00000\.parquet cannot be read .*interrupted"):
        units(tmp_path)


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_fingerprints_change_with_the_files(tmp_path: Path, layout: str) -> None:
    write_img2dataset(tmp_path, [[PAIR] * 8])
    write_parquet(tmp_path / "00000.parquet", ["000000000"])
    if layout == "files":
        as_files(tmp_path)
    before = [unit.fingerprint() for unit in units(tmp_path)]
    assert before == [unit.fingerprint() for unit in units(tmp_path)] and len(set(before)) == 2
    if layout == "files":
        (tmp_path / "00000" / "000000007.txt").write_text("another text")
        after = [unit.fingerprint() for unit in units(tmp_path)]
        assert after[0] == before[0] and after[1] != before[1]
    write_parquet(tmp_path / "00000.parquet", ["000000000"], punsafe=[0.5])
    assert not set(before) & {unit.fingerprint() for unit in units(tmp_path)}
