"""Documents: images stand where they stood, text alone is supervised, what is lost is counted or left out as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.raw.test_img2dataset import as_files, write_parquet
from tests.data.raw.test_tables import write_table
from tests.data.raw_data import picture, write_img2dataset
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.data.raw.unit import RawDrop, RawSample
from vlm_nemo.data.sample import BAD_JSON, BROKEN_IMAGE, MARKER_WITHOUT_IMAGE, MISSING_IMAGE, NO_LABEL
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX, UserError

DOCUMENT = {
    "images": [None, "0.jpg", None, "1.jpg", "2.jpg"],
    "texts": ["A cat.\n\nIt sleeps. ", None, "A dog:", None, None],
}


def read(folder: Path, path: str, options: dict[str, str] | None = None, **where: str) -> list[RawSample | RawDrop]:
    places = {"path": folder / path} | {key: folder / name for key, name in where.items()}
    units = KINDS["interleaved"].list_units(places, options or {}, 2, map)
    return [raw for unit in units for raw in unit.read()]


def write_images(folder: Path, count: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(i))


def test_images_stand_where_they_stood(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_images(tmp_path / "pictures")
    metadata = json.dumps({"url": "http://h/page", "language": "en", "nested": {}})
    write_table(tmp_path / "docs.parquet", [DOCUMENT | {"general_metadata": metadata, "metadata": "[null]"}])
    (tmp_path / "manifest.yaml").write_text(
        "sources: {docs: {kind: interleaved, path: docs.parquet, images: pictures}}"
    )
    prepare(PrepareConfig(manifest=str(tmp_path / "manifest.yaml"), out=str(tmp_path / "out"), workers=1))
    folder = ShardFolder(tmp_path / "out" / "docs")
    assert folder.images(0) == [picture(i) for i in range(3)]
    messages = folder.record(0).messages
    text = "A cat.\n\nIt sleeps.\n<image>\nA dog:\n<image>\n<image>"
    assert messages == [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]

    found = encode_conversation(messages, tokenizer, TEMPLATES["plain"], [plain(n) for n in (2, 3, 4)])
    supervised = [label for label in found.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == text.replace("<image>", "") and supervised[-1] == tokenizer.eos_id
    ignored = [token for token, label in zip(found.tokens, found.labels, strict=True) if label == IGNORE_INDEX]
    assert ignored == [tokenizer.bos_id] + [tokenizer.image_id] * 9

    (sample,) = read(tmp_path, "docs.parquet", images="pictures")
    assert isinstance(sample, RawSample) and sample.facts == {"url": "http://h/page", "language": "en"}


@pytest.mark.parametrize("layout", ["webdataset", "files"])
@pytest.mark.parametrize("parquet", [True, False])
def test_images_are_found_by_their_address(tmp_path: Path, layout: str, parquet: bool) -> None:
    pairs = [{"jpg": picture(i), "txt": b"alt"} for i in range(4)]
    write_img2dataset(tmp_path / "web", [pairs[:2], pairs[2:]])
    # The json says http://h/KEY; the parquet, where it is there, http://h/0, http://h/1 in each shard
    addresses = [f"http://h/{shard:05d}{i:04d}" for shard in range(2) for i in range(2)]
    if parquet:
        for shard in range(2):
            urls = addresses[2 * shard : 2 * shard + 2] + ["http://h/lost"]
            keys = [f"{shard:05d}{i:04d}" for i in range(2)]
            write_parquet(tmp_path / "web" / f"{shard:05d}.parquet", keys, failed=1, url=urls)
    if layout == "files":
        as_files(tmp_path / "web")
    document = {"images": [addresses[3], None, addresses[0]], "texts": [None, "between", None]}
    lost = {"images": ["http://h/lost", None], "texts": [None, "after"]}
    write_table(tmp_path / "docs.jsonl", [document, lost])
    found, gone = read(tmp_path, "docs.jsonl", downloaded="web")
    assert isinstance(found, RawSample) and [image.data for image in found.images] == [picture(3), picture(0)]
    assert (
        isinstance(gone, RawDrop) and gone.reason == MISSING_IMAGE and "http://h/lost was not downloaded" in gone.detail
    )


def test_units_take_along_their_own_images_only(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "web", [[{"jpg": picture(i), "txt": b"alt"} for i in range(4)]])
    rows = [{"images": [f"http://h/00000000{i}", None], "texts": [None, "text"]} for i in range(4)]
    write_table(tmp_path / "docs.jsonl", rows)
    places = {"path": tmp_path / "docs.jsonl", "downloaded": tmp_path / "web"}
    units = KINDS["interleaved"].list_units(places, {}, 2, map)
    assert [sorted(unit.found) for unit in units] == [
        ["http://h/000000000", "http://h/000000001"],
        ["http://h/000000002", "http://h/000000003"],
    ]


def test_lost_images_drop_the_document_or_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "2.jpg").write_bytes(b"<html>")
    write_table(tmp_path / "docs.json", [DOCUMENT, {"images": ["2.jpg", "3.jpg", None], "texts": [None, None, "text"]}])
    dropped = read(tmp_path, "docs.json")
    assert [raw.reason for raw in dropped if isinstance(raw, RawDrop)] == [BROKEN_IMAGE, BROKEN_IMAGE]
    kept, none_left = read(tmp_path, "docs.json", {"lost": "skip"})
    assert isinstance(kept, RawSample) and kept.facts == {"images_lost": 1.0} and len(kept.images) == 2
    assert kept.messages[1]["content"] == "A cat.\n\nIt sleeps.\n<image>\nA dog:\n<image>"
    assert isinstance(none_left, RawDrop) and none_left.reason == BROKEN_IMAGE
    with pytest.raises(UserError, match="lost=keep is unknown; choose one of drop, skip"):
        read(tmp_path, "docs.json", {"lost": "keep"})
    with pytest.raises(UserError, match="not both"):
        read(tmp_path, "docs.json", images="a", downloaded="b")


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    write_images(tmp_path)
    cases: list[tuple[Any, str | None]] = [
        ({"images": [None], "texts": ["text alone"]}, None),
        ({"images": ["0.jpg"], "texts": [None]}, NO_LABEL),
        ({"images": [None, "0.jpg"], "texts": [" \n", None]}, NO_LABEL),
        ({"images": [], "texts": []}, NO_LABEL),
        ({"images": ["0.jpg"], "texts": ["both"]}, BAD_JSON),
        ({"images": ["0.jpg"], "texts": []}, BAD_JSON),
        ({"images": [3], "texts": [None]}, BAD_JSON),
        ({"texts": ["a"]}, BAD_JSON),
        ("text", BAD_JSON),
        ({"images": ["0.jpg", None], "texts": [None, "an <image> tag"]}, MARKER_WITHOUT_IMAGE),
        ({"images": ["9.jpg", None], "texts": [None, "text"]}, MISSING_IMAGE),
    ]
    write_table(tmp_path / "docs.jsonl", [row for row, _ in cases])
    raws = read(tmp_path, "docs.jsonl")
    assert [raw.reason if isinstance(raw, RawDrop) else None for raw in raws] == [reason for _, reason in cases]


def test_fingerprints_change_with_the_images(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"images": [f"{i}.jpg", None], "texts": [None, "text"]} for i in range(3)]
    write_table(tmp_path / "docs.parquet", rows)

    def prints(lost: str) -> list[str]:
        units = KINDS["interleaved"].list_units({"path": tmp_path / "docs.parquet"}, {"lost": lost}, 1, map)
        return [unit.fingerprint() for unit in units]

    before = prints("drop")
    assert before == prints("drop") and len(set(before)) == 3 and not set(before) & set(prints("skip"))
    (tmp_path / "1.jpg").write_bytes(picture(7, (60, 60)))
    assert [a == b for a, b in zip(before, prints("drop"), strict=True)] == [True, False, True]
