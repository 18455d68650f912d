"""Tables in every form give the same rows, whole or in pieces, and questions become samples."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.raw_data import picture
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.data.raw.table import list_rows
from vlm_nemo.data.raw.unit import RawDrop, RawSample
from vlm_nemo.data.sample import (
    BAD_JSON,
    BROKEN_IMAGE,
    MARKER_WITHOUT_IMAGE,
    MISSING_IMAGE,
    NO_LABEL,
)
from vlm_nemo.types import UserError

ROWS = [{"image": f"{i % 3}.jpg", "question": f'hue "{i}"?\n', "answer": f"red, {i}"} for i in range(11)]


def write_table(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        if path.suffix == ".tsv":
            path.write_text("\n".join("\t".join(row) for row in [rows[0], *(row.values() for row in rows)]) + "\n")
            return path
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(
    folder: Path, path: str, options: dict[str, str] | None = None, shard_samples: int = 3
) -> list[RawSample | RawDrop]:
    units = KINDS["vqa"].list_units({"path": folder / path}, options or {}, shard_samples, map)
    assert all(unit.count <= shard_samples for unit in units)
    found = [list(unit.read()) for unit in units]
    assert [len(raws) for raws in found] == [unit.count for unit in units]
    return [raw for raws in found for raw in raws]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, size: int) -> None:
    rows = [row | {"question": str(row["question"]).strip()} for row in ROWS]
    table = write_table(tmp_path / f"table.{form}", rows)
    pieces = list_rows(table, size)
    assert [row for piece in pieces for row in piece.read()] == rows
    assert [piece.first for piece in pieces] == list(range(0, 11, size))
    assert [list(piece.read()) for piece in reversed(pieces)][-1] == rows[:size]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    write_table(tmp_path / "train-00000-of-00002.parquet", ROWS[:4])
    write_table(tmp_path / "train-00001-of-00002.parquet", ROWS[4:])
    (tmp_path / "README.md").write_text("not a table")
    pieces = list_rows(tmp_path, 3)
    assert [piece.count for piece in pieces] == [3, 1, 3, 3, 1]
    assert [row for piece in pieces for row in piece.read()] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "is no table: give a file"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.json", b"{}", "holds a dict, not a list"),
        ("a.csv", b"\xff\xfe,x\n1,2", "cannot be read"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list_rows(tmp_path / name, 3)
    with pytest.raises(UserError, match="cannot be read"):
        list_rows(tmp_path / "nowhere.jsonl", 3)


def test_images_as_bytes_structs_paths_and_lists(tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    (tmp_path / "two.jpg").write_bytes(two)
    asked = {"question": "hue?", "answer": "red"}
    write_table(tmp_path / "bytes.parquet", [{"image": one} | asked])
    struct = [
        {"image": {"bytes": one, "path": "x.jpg"}},
        {"image": {"bytes": None, "path": "two.jpg"}},
        {"image": None},
    ]
    write_table(tmp_path / "struct.parquet", [row | asked for row in struct])
    write_table(
        tmp_path / "list.parquet", [{"image": [{"bytes": one, "path": None}, {"bytes": two, "path": None}]} | asked]
    )
    write_table(tmp_path / "path.jsonl", [{"image": "two.jpg"} | asked, {"image": ["two.jpg"]} | asked, asked])
    expected = {
        "bytes.parquet": [[one]], "struct.parquet": [[one], [two], []], "list.parquet": [[one, two]],
        "path.jsonl": [[two], [two], []],
    }  # fmt: skip
    for name, images in expected.items():
        samples = read(tmp_path, name)
        assert [
            [image.data for image in sample.images] for sample in samples if isinstance(sample, RawSample)
        ] == images
        for sample, own in zip(samples, images, strict=True):
            assert isinstance(sample, RawSample)
            assert sample.messages[0]["content"] == "<image>\n" * len(own) + "hue?"


def test_names_of_columns_suffix_and_facts(tmp_path: Path) -> None:
    row = {
        "img": picture(1),
        "q": "What <image> hue?",
        "answers": ["blue", "red", " red"],
        "type": "hue",
        "Split": "a",
        "n": 3,
    }
    write_table(tmp_path / "t.parquet", [row])
    options = {"image": "img", "question": "q", "answer": "answers", "group": "type", "suffix": "\nOne word."}
    (sample,) = read(tmp_path, "t.parquet", options)
    assert isinstance(sample, RawSample)
    assert [m["content"] for m in sample.messages] == ["What <image> hue?\nOne word.", "red"]
    assert sample.kind == "hue" and sample.facts == {"type": "hue", "split": "a", "n": 3.0}
    assert sample.name == "t.parquet row 0"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (["no", "yes", "yes"], "yes"),
        (["no", "yes"], "no"),
        ([{"answer": "net", "answer_id": 1}, {"answer": "nets", "answer_id": 2}, {"answer": "nets"}], "nets"),
        (3, "3"),
    ],
)
def test_one_of_several_answers(tmp_path: Path, answer: Any, said: str) -> None:
    write_table(tmp_path / "t.jsonl", [{"question": "?", "answer": answer}])
    (sample,) = read(tmp_path, "t.jsonl")
    assert isinstance(sample, RawSample) and sample.messages[1]["content"] == said


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(1))
    (tmp_path / "broken.jpg").write_bytes(b"x")
    good = {"image": "0.jpg", "question": "hue?", "answer": "red"}
    bad: list[tuple[Any, str]] = [
        (good | {"image": "nowhere.jpg"}, MISSING_IMAGE),
        (good | {"image": "../0.jpg"}, MISSING_IMAGE),
        (good | {"image": "/etc/hostname"}, MISSING_IMAGE),
        (good | {"image": "a\0.jpg"}, MISSING_IMAGE),
        (good | {"image": "a" * 5000}, MISSING_IMAGE),
        (good | {"image": "broken.jpg"}, BROKEN_IMAGE),
        (good | {"image": 3}, BAD_JSON),
        (good | {"question": "<image><image>?"}, MARKER_WITHOUT_IMAGE),
        (good | {"question": 3}, BAD_JSON),
        (good | {"answer": []}, NO_LABEL),
        (good | {"answer": None}, NO_LABEL),
        (good | {"answer": [3]}, BAD_JSON),
        ({"image": "0.jpg", "question": "hue?"}, BAD_JSON),
        (["a", "list"], BAD_JSON),
    ]
    write_table(tmp_path / "t.jsonl", [row for row, _ in bad] + [good])
    with open(tmp_path / "t.jsonl", "a") as stream:
        stream.write('\n{"cut')
    raws = read(tmp_path, "t.jsonl")
    assert [raw.reason if isinstance(raw, RawDrop) else None for raw in raws] == [r for _, r in bad] + [None, BAD_JSON]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_fingerprints_change_with_what_is_read(tmp_path: Path, form: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    table = write_table(tmp_path / f"t.{form}", ROWS)

    def prints(options: dict[str, str]) -> list[str]:
        return [unit.fingerprint() for unit in KINDS["vqa"].list_units({"path": table}, options, 1, map)]

    before = prints({})
    assert before == prints({}) and len(set(before)) == 11
    assert not set(before) & set(prints({"suffix": "\nOne word."}))
    (tmp_path / "2.jpg").write_bytes(picture(9, (50, 50)))
    assert [i for i, (a, b) in enumerate(zip(before, prints({}), strict=True)) if a != b] == [2, 5, 8]
