"""prepare: what is usable comes through unchanged, what is not is counted and named, what is done is kept."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.raw_data import good_rows, picture, turns, write_img2dataset, write_llava, write_manifest
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare import convert, pool
from vlm_nemo.data.prepare.manifest import read_manifest
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.sample import (
    BAD_JSON,
    BROKEN_IMAGE,
    EMPTY_CAPTION,
    IMAGE_SIZE,
    IMAGE_WITHOUT_MARKER,
    MARKER_WITHOUT_IMAGE,
    MISSING_IMAGE,
    NO_LABEL,
)
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

PAIR = {"jpg": picture(1), "txt": b"a red circle"}
BAD_PAIRS: list[tuple[dict[str, bytes], str]] = [
    (PAIR | {"txt": b" \n"}, EMPTY_CAPTION),
    (PAIR | {"jpg": b""}, BROKEN_IMAGE),
    (PAIR | {"jpg": b"<html>"}, BROKEN_IMAGE),
    (PAIR | {"jpg": picture(1, (1, 1), "PNG")}, IMAGE_SIZE),
    ({"txt": b"no picture"}, MISSING_IMAGE),
    (PAIR | {"txt": b"an <image> of"}, MARKER_WITHOUT_IMAGE),
    (PAIR | {"json": b"{"}, BAD_JSON),
    ({"jpg": PAIR["jpg"], "txt": b"\xff\xfe", "json": b"{}"}, BAD_JSON),
]
BAD_ROWS: list[tuple[Any, str]] = [
    ({"id": "a", "image": "nowhere.jpg", "conversations": turns("<image>", "red")}, MISSING_IMAGE),
    ({"id": "b", "image": "../instruct.json", "conversations": turns("<image>", "red")}, MISSING_IMAGE),
    ({"id": "c", "image": "broken.jpg", "conversations": turns("<image>", "red")}, BROKEN_IMAGE),
    ({"id": "d", "image": "0.jpg", "conversations": turns("Colour?", "red")}, IMAGE_WITHOUT_MARKER),
    ({"id": "e", "image": ["0.jpg", "1.jpg"], "conversations": turns("<image>", "red")}, IMAGE_WITHOUT_MARKER),
    ({"id": "f", "conversations": turns("<image>", "red")}, MARKER_WITHOUT_IMAGE),
    ({"id": "g", "conversations": turns("Colour?", "")}, NO_LABEL),
    ({"id": "h", "conversations": turns("Colour?")}, NO_LABEL),
    ({"id": "i", "conversations": [{"from": "cat", "value": "x"}]}, BAD_JSON),
    ({"id": "j", "conversations": [{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]}, BAD_JSON),
    ({"id": "k", "image": 3, "conversations": turns("<image>", "red")}, BAD_JSON),
    ({"id": "l"}, BAD_JSON),
    ("a row that is text", BAD_JSON),
]


def config(folder: Path, **changes: Any) -> PrepareConfig:
    given = {"manifest": str(folder / "manifest.yaml"), "out": str(folder / "out"), "shard_samples": 4, "workers": 1}
    return PrepareConfig(**(given | changes))


def tally(bad: list[tuple[Any, str]]) -> dict[str, int]:
    reasons = [reason for _, reason in bad]
    return {reason: reasons.count(reason) for reason in sorted(reasons)}


def test_raw_faults_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [PAIR] * 3 + [pair for pair, _ in BAD_PAIRS] + [PAIR] * 2
    write_img2dataset(tmp_path / "captions", [pairs])
    write_llava(tmp_path, good_rows(5) + [row for row, _ in BAD_ROWS])
    (tmp_path / "images" / "broken.jpg").write_bytes(picture(1)[:40])
    write_manifest(tmp_path)
    with caplog.at_level(logging.WARNING):
        done = prepare(config(tmp_path))
    assert done["captions"]["dropped"] == tally(BAD_PAIRS) and done["captions"]["records"] == 5
    assert done["instruct"]["dropped"] == tally(BAD_ROWS) and done["instruct"]["records"] == 5
    for manifest in done.values():
        assert manifest["seen"] == manifest["records"] + sum(manifest["dropped"].values())
    for name, text in [(f"00000/{i}", f"00000.tar/0000000{i:02d}:") for i in range(3, 11)]:
        assert sum(text in record.getMessage() for record in caplog.records) == 1, name
    for letter in "abcdefghijkl":
        assert sum(f"(id {letter})" in record.getMessage() for record in caplog.records) == 1, letter
    assert len(caplog.records) == len(BAD_PAIRS) + len(BAD_ROWS)
    assert len(ShardFolder(tmp_path / "out" / "captions")) == 5

    caplog.clear()
    again = prepare(config(tmp_path))
    assert again == done and not caplog.records


def test_contents_come_through_unchanged(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "captions", [[PAIR], [PAIR | {"txt": " ein Vögelchen \n".encode()}]])
    rows = good_rows(8)
    write_llava(tmp_path, rows)
    write_manifest(tmp_path)
    prepare(config(tmp_path))
    captions = ShardFolder(tmp_path / "out" / "captions")
    assert captions.record(1).messages == [
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "ein Vögelchen"},
    ]
    assert captions.images(1) == [PAIR["jpg"]] and captions.record(1).source_id == "00001.tar/000010000"
    instruct = ShardFolder(tmp_path / "out" / "instruct")
    for number, row in enumerate(rows):
        record = instruct.record(number)
        assert [m["content"] for m in record.messages] == [turn["value"] for turn in row["conversations"]]
        assert record.kind == row.get("kind") and f"(id q{number})" in record.source_id
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert instruct.images(number) == [(tmp_path / "images" / name).read_bytes() for name in names]


def test_what_is_prepared_is_kept_and_what_changed_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_img2dataset(tmp_path / "captions", [[PAIR] * 6])
    write_llava(tmp_path, good_rows(10))
    write_manifest(tmp_path)
    out = tmp_path / "out"
    first = prepare(config(tmp_path, tokenizer_vocab=280))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar*")}
    capsys.readouterr()
    assert prepare(config(tmp_path, tokenizer_vocab=280)) == first
    said = capsys.readouterr().err
    assert said.count("reused as it was") == 3 and said.count("reused as they were") == 2, said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar*")} == stamps

    (tmp_path / "images" / "8.jpg").write_bytes(picture(999))  # used by row 8 only, in the third shard
    (out / "instruct" / "00009.tar").write_bytes(b"left over")
    second = prepare(config(tmp_path, tokenizer_vocab=280))
    changed = {path.name for path in out.rglob("*.tar") if stamps.get(path) != path.stat().st_mtime_ns}
    assert changed == {"00002.tar"} and "2 of 3 shards reused" in capsys.readouterr().err
    assert not (out / "instruct" / "00009.tar").exists()
    assert second["captions"] == first["captions"] and second["instruct"] != first["instruct"]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava(tmp_path, good_rows(12))
    write_manifest(tmp_path, ("instruct",))
    whole = prepare(config(tmp_path, out=str(tmp_path / "whole")))
    real = convert.convert

    def stops(task: convert.Task) -> tuple[int, dict[str, Any]]:
        if task.number == 2:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr("vlm_nemo.data.prepare.source.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("vlm_nemo.data.prepare.source.convert", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path))
    with pytest.raises(UserError, match="half prepared"):
        ShardFolder(tmp_path / "out" / "instruct")
    stamp = (tmp_path / "out" / "instruct" / "00001.tar").stat().st_mtime_ns
    monkeypatch.setattr("vlm_nemo.data.prepare.source.convert", real)
    assert prepare(config(tmp_path)) == whole
    assert (tmp_path / "out" / "instruct" / "00001.tar").stat().st_mtime_ns == stamp


def test_several_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PARALLEL_SAMPLES", 1)
    write_img2dataset(tmp_path / "captions", [[PAIR] * 9 + [PAIR | {"jpg": b"x"}]] * 2)
    write_llava(tmp_path, good_rows(9))
    write_manifest(tmp_path)
    one = prepare(config(tmp_path, out=str(tmp_path / "one")))
    two = prepare(config(tmp_path, out=str(tmp_path / "two"), workers=2))
    assert one == two and one["captions"]["dropped"] == {BROKEN_IMAGE: 2}


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "captions", [[pair for pair, _ in BAD_PAIRS[:3]]])
    write_manifest(tmp_path, ("captions",))
    with pytest.raises(UserError, match=r"captions: none of 3 samples can be used \(2 broken image, 1 empty caption\)"):
        prepare(config(tmp_path))


def test_what_the_index_says_is_no_fact_of_a_record(tmp_path: Path) -> None:
    """But a filter may still ask for it."""
    wide = PAIR | {"json": b'{"url": "http://h/a", "width": 50, "height": 30, "sha256": "0", "similarity": 0.5}'}
    write_img2dataset(tmp_path / "captions", [[PAIR, wide]])
    (tmp_path / "manifest.yaml").write_text(
        "sources:\n  captions: {kind: img2dataset, path: captions, filter: {min_width: 45}}\n"
    )
    prepare(config(tmp_path))
    folder = ShardFolder(tmp_path / "out" / "captions")
    assert [folder.record(i).facts for i in range(len(folder))] == [{"url": "http://h/a", "similarity": 0.5}]


@pytest.mark.parametrize("damage", ["boundary", "header", "zeros", "middle", "nothing"])
def test_a_damaged_tar_is_named(tmp_path: Path, damage: str) -> None:
    write_img2dataset(tmp_path / "captions", [[PAIR] * 5])
    tar = tmp_path / "captions" / "00000.tar"
    with tarfile.open(tar) as archive:
        third = archive.getmembers()[6]
    data = bytearray(tar.read_bytes())
    if damage == "boundary":
        del data[third.offset :]
    elif damage == "header":
        data[third.offset : third.offset + 512] = b"\x55" * 512
    elif damage == "zeros":  # what looks like the tar's end
        data[third.offset : third.offset + 512] = bytes(512)
    elif damage == "middle":
        del data[third.offset_data + 10 :]
    else:
        data.clear()
    tar.write_bytes(bytes(data))
    write_manifest(tmp_path, ("captions",))
    with pytest.raises(UserError, match=r"00000\.tar is damaged (or cut )?after [067] members"):
        prepare(config(tmp_path))


def test_json_lines_lose_only_the_broken_line(tmp_path: Path) -> None:
    write_llava(tmp_path, [])
    lines = [json.dumps(row) for row in good_rows(3)] + ['{"id": "cut', ""]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "manifest.yaml").write_text(
        "name: test\nroot: .\nsources: {instruct: {kind: llava, json: rows.jsonl, images: images}}\n"
    )
    done = prepare(config(tmp_path))["instruct"]
    assert done["records"] == 3 and done["dropped"] == {BAD_JSON: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {kind: lava, json: x, images: y}}", r"sources\.a\.kind=lava is unknown; did you mean llava\?"),
        ("sources: {a: {kind: llava, jsn: x, images: y}}", r"sources\.a\.jsn is unknown; did you mean json\?"),
        ("sources: {a: {kind: llava, json: x}}", r"sources\.a\.images is missing"),
        ("source: {a: {kind: llava}}", r"source is unknown; did you mean sources\?"),
        ("sources: {}", "names no source"),
        ("sources: {tokenizer: {kind: img2dataset, path: x}}", "choose another"),
        ("- a", "not a table"),
        ("a: [", "cannot be read"),
        ("sources: {a: {kind: img2dataset, path: x}}", r"x holds no \.tar files"),
        ("sources: {a: {kind: llava, json: x, images: y}}", "x cannot be read"),
    ],
)
def test_a_wrong_manifest_says_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path))


def test_what_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_bytes(b"sources: {a: {kind: vqa, path: \xff}}")
    with pytest.raises(UserError, match=r"manifest\.yaml cannot be read: 'utf-8' codec"):
        prepare(config(tmp_path))
    manifest.write_text("sources: {a: {kind: vqa, path: x}}")
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=rf"out={tmp_path}/{out} cannot be written: .*; choose another folder"):
            prepare(config(tmp_path, out=str(tmp_path / out)))
    for value in (50.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="^max_bad_fraction=.* must be a share from 0 to 1"):
            prepare(config(tmp_path, max_bad_fraction=value))


def test_paths_are_relative_to_root(tmp_path: Path) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text("root: raw\nsources: {a: {kind: img2dataset, path: x}}")
    assert read_manifest(path)[0].where == {"path": tmp_path / "raw" / "x"}


def test_the_tokenizer_writes_what_the_shards_say(prepared: Path) -> None:
    tokenizer = Tokenizer(prepared / "tokenizer")
    assert 260 < tokenizer.vocab_size <= 320
    assert tokenizer.decode(tokenizer.encode("a picture of 3 red circles")) == "a picture of 3 red circles"
    assert len(tokenizer.encode(" red circles")) == 2


def test_too_many_faults_stop_prepare_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    pairs = [PAIR] * 3 + [pair for pair, _ in BAD_PAIRS]
    write_img2dataset(tmp_path / "captions", [pairs])
    write_llava(tmp_path, good_rows(5))
    write_manifest(tmp_path)
    with pytest.raises(
        UserError, match=r"8 of 11 samples of source captions had to .*; more than max_bad_fraction=0.01"
    ):
        prepare(config(tmp_path, min_samples_before_stop=10))
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["dropped"] == {"captions": tally(BAD_PAIRS)}
    assert ledger["seen"] == ledger["used"] + len(BAD_PAIRS)
    prepare(config(tmp_path, min_samples_before_stop=10, max_bad_fraction=0.9))
