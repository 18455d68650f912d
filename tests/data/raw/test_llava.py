"""LLaVA's files: where markers stand, rows without images, the first stage's captions, facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.raw_data import turns, write_llava
from vlm_nemo.data.raw.kinds import KINDS
from vlm_nemo.data.raw.unit import RawDrop, RawSample
from vlm_nemo.data.sample import BAD_JSON, IMAGE_WITHOUT_MARKER, MARKER_WITHOUT_IMAGE, MISSING_IMAGE, NO_LABEL
from vlm_nemo.types import UserError


def read(folder: Path, rows: list[Any], **options: str) -> list[RawSample | RawDrop]:
    write_llava(folder, rows, images=3)
    places = {"json": folder / "instruct.json", "images": folder / "images"}
    return [raw for unit in KINDS["llava"].list_units(places, options, 2, map) for raw in unit.read()]


@pytest.mark.parametrize("image", [None, "", []])
def test_rows_without_an_image_are_text(tmp_path: Path, image: Any) -> None:
    row = {"id": "a", "image": image, "conversations": turns("Say red.", "red")}
    text, missing, marked = read(
        tmp_path,
        [row, {k: v for k, v in row.items() if k != "image"}, row | {"conversations": turns("<image>\nHue?", "red")}],
    )
    for sample in (text, missing):
        assert isinstance(sample, RawSample) and not sample.images and sample.facts == {"folder": "no image"}
    assert isinstance(marked, RawDrop) and marked.reason == MARKER_WITHOUT_IMAGE


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("0.jpg", ["<image>\nHue?", "red"]),
        ("0.jpg", ["Hue?\n<image>", "red"]),
        ("0.jpg", ["Of <image> this: hue?", "red", "And shape?", "round"]),
        ("0.jpg", ["Hi.", "Hello.", "<image>Hue?", "red"]),
        (["0.jpg", "1.jpg"], ["<image>\n<image>\nSame?", "no"]),
        (["0.jpg", "1.jpg"], ["First <image>", "red", "and <image>?", "blue"]),
        (["0.jpg"], ["<image>", "red"]),
    ],
)
def test_markers_stay_where_they_stand(tmp_path: Path, image: Any, said: list[str]) -> None:
    (sample,) = read(tmp_path, [{"id": "a", "image": image, "conversations": turns(*said)}])
    assert isinstance(sample, RawSample)
    assert [message["content"] for message in sample.messages] == said
    assert len(sample.images) == (len(image) if isinstance(image, list) else 1)


def test_facts_say_where_a_row_is_from(tmp_path: Path) -> None:
    (tmp_path / "images" / "coco" / "train2017").mkdir(parents=True)
    rows = [
        {
            "id": 1,
            "image": "0.jpg",
            "conversations": turns("<image>", "red"),
            "model": "gpt4",
            "Score": 0.5,
            "kind": "k",
        },
        {"id": 2, "image": "coco/train2017/0.jpg", "conversations": turns("<image>", "red")},
    ]
    read(tmp_path, rows)
    (tmp_path / "images" / "coco" / "train2017" / "0.jpg").write_bytes((tmp_path / "images" / "0.jpg").read_bytes())
    first, second = read(tmp_path, rows)
    assert isinstance(first, RawSample) and first.facts == {"folder": ".", "model": "gpt4", "score": 0.5}
    assert isinstance(second, RawSample) and second.facts == {"folder": "coco/train2017"} and first.kind == "k"


def test_the_first_stage_keeps_captions_only(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "0.jpg", "conversations": turns("Describe it briefly.\n<image>", "a red ring")},
        {"id": "b", "image": ["0.jpg", "1.jpg"], "conversations": turns("<image>\nand <image>", "rings")},
        {"id": "c", "image": "0.jpg", "conversations": turns("<image>\nHue?", "red", "Shape?", "ring")},
        {"id": "d", "conversations": turns("Hue?", "red")},
        {"id": "e", "image": "0.jpg", "conversations": turns("Hue?", "red")},
        {"id": "f", "image": "0.jpg", "conversations": turns("<image>", " ")},
        {"id": "g", "image": "9.jpg", "conversations": turns("<image>", "red")},
    ]
    one, two, *bad = read(tmp_path, rows, captions="True")
    assert isinstance(one, RawSample) and [m["content"] for m in one.messages] == ["<image>", "a red ring"]
    assert isinstance(two, RawSample) and [m["content"] for m in two.messages] == ["<image>\n<image>", "rings"]
    reasons = [raw.reason for raw in bad if isinstance(raw, RawDrop)]
    assert reasons == [BAD_JSON, BAD_JSON, IMAGE_WITHOUT_MARKER, NO_LABEL, MISSING_IMAGE]
    with pytest.raises(UserError, match="captions=perhaps must be true or false"):
        read(tmp_path, rows, captions="perhaps")


def test_a_large_file_is_read_once_and_units_hold_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llava(tmp_path, [{"id": i, "conversations": turns("Say.", str(i))} for i in range(100)])
    loads, real = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: loads.append(len(text)) or real(text))
    places = {"json": tmp_path / "instruct.json", "images": tmp_path / "images"}
    units = KINDS["llava"].list_units(places, {}, 10, map)
    for unit in units:
        unit.fingerprint()
        assert len(list(unit.read())) == unit.count == len(unit.rows) == 10
    assert len(loads) == 1
