"""The audit: its figures are those of the data, its picture is there, and nothing is converted twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.raw_data import good_rows, picture, write_img2dataset, write_llava
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.prepare.survey import percentiles_of_counts, script_of
from vlm_nemo.types import UserError

MANIFEST = """
sources:
  captions: {kind: img2dataset, path: captions, filter: {min_side: 20}}
  instruct: {kind: llava, json: instruct.json, images: images}
"""


def config(folder: Path, **changes: Any) -> PrepareConfig:
    given = {"manifest": str(folder / "manifest.yaml"), "out": str(folder / "out"), "shard_samples": 4, "workers": 1}
    given |= {"max_bad_fraction": 1.0, "image_size": 28, "patch_size": 14, "capacity": 512}
    return PrepareConfig(**(given | changes))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    sizes = [(40, 30), (40, 30), (64, 48), (100, 20), (16, 16)]
    texts = ["a red circle", "a red circle", "красный круг", "rund und rot", "too small"]
    pairs = []
    for i, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        facts = {"caption": text, "url": f"http://host{i % 2}.example/{i}.jpg", "similarity": 0.3 + i / 100}
        pair = {
            "jpg": picture(min(i, 1), size),
            "txt": text.encode(),
            "json": json.dumps(facts | {"LANGUAGE": "en"}).encode(),
        }
        pairs.append(pair)
    pairs[1] = pairs[0] | {"txt": b"another caption"}
    pairs.append({"jpg": b"<html>", "txt": b"broken"})
    write_img2dataset(tmp_path / "captions", [pairs])
    rows = good_rows(12)
    write_llava(tmp_path, rows)
    (tmp_path / "images" / "8.jpg").write_bytes(pairs[2]["jpg"])
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    return tmp_path


def test_the_figures_are_those_of_the_data(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(raw, tokenizer_vocab=300, template="short", audit=True))
    said = capsys.readouterr().out
    content = json.loads((raw / "out" / "audit" / "audit.json").read_text())
    captions, instruct = content["sources"]["captions"], content["sources"]["instruct"]
    assert (captions["seen"], captions["records"], captions["images"], captions["image_copies"]) == (6, 4, 4, 1)
    assert captions["dropped"] == {"broken image": 1, "filtered": 1}
    assert captions["examples"]["min_side=20"] == ["00000.tar/000000004: side 16, wanted min_side=20"]
    assert captions["examples"]["broken image"][0].startswith("00000.tar/000000005: ")
    assert captions["damaged"] == instruct["damaged"] == {}
    assert captions["shorter_side"]["min"] == 20 and captions["longer_side"]["max"] == 100
    assert captions["aspect"]["max"] == 5
    assert captions["scripts"] == {"Latin": 3, "Cyrillic": 1}
    assert captions["facts"]["similarity"]["percentiles"]["max"] == pytest.approx(0.33)
    assert captions["facts"]["url"]["hosts"] == {"host0.example": 3, "host1.example": 1}
    assert captions["facts"]["language"]["values"] == {"en": 4}
    assert captions["words"] == {"min": 2, "1 %": 2, "10 %": 2, "median": 3, "90 %": 3, "99 %": 3, "max": 3}
    assert content["images_in_two_sources"] == [{"sources": ["captions", "instruct"], "images": 1}]
    assert (
        instruct["records"] == 12
        and instruct["facts"]["folder"]["values"] == {".": 9, "no image": 3}
        and instruct["text_tokens"] > 100
    )
    assert set(content["fill"]) == {"captions", "instruct", "all sources"} and content["tokens_an_image"] == 4
    assert "512" in content["fill"]["captions"] and content["advice"]["captions"].startswith("capacity 512 fills to")
    assert set(content["delay"]) == set(content["vision_balance"]) == set(content["fill"])
    # Four samples that come again and again, one image each: a wait of a pool, at least; rows of about as many images
    assert 63 <= content["delay"]["captions"] < 200
    assert 1 <= content["vision_balance"]["captions"]["4"] <= content["vision_balance"]["captions"]["1"] < 1.5
    for text in (
        "captions",
        "busiest of 8 towers",
        "1 images are in both captions and instruct",
        "min_side=20",
        "fill of packed rows",
    ):
        assert text in said, text
    pixels = np.asarray(Image.open(raw / "out" / "audit" / "audit.png").convert("L"))
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1400 and pixels.std() > 10


def test_what_is_prepared_is_audited_as_it_is(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(raw))
    stamps = {path: path.stat().st_mtime_ns for path in raw.glob("out/*/*.tar*")}
    prepare(config(raw, audit=True))
    assert {path: path.stat().st_mtime_ns for path in raw.glob("out/*/*.tar*")} == stamps
    caught = capsys.readouterr()
    assert "no token lengths are prepared: add tokenizer=DIR" in caught.out
    assert caught.err.count("reused as it was") == 2
    content = json.loads((raw / "out" / "audit" / "audit.json").read_text())
    assert content["tokens"] == content["fill"] == {} and content["lengths"] is None


@pytest.mark.parametrize("what", ["image", "header", "all of a source"])
def test_damaged_shards_are_named_when_all_is_written(raw: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    wanted = config(raw, tokenizer_vocab=300, template="short", audit=True)
    prepare(replace(wanted, audit=False))
    out = raw / "out"
    bad = [out / "captions" / "00000.tar"] if what == "all of a source" else [out / "instruct" / "00001.tar"]
    for tar in bad:
        data = bytearray(tar.read_bytes())
        data[data.index(b"00000" if what == "header" else b"\xff\xd9")] ^= 1
        tar.write_bytes(data)
    with pytest.raises(UserError) as caught:
        prepare(wanted)
    assert str(caught.value).startswith(f"damaged: {', '.join(map(str, bad))}; remove them")
    sources = json.loads((out / "audit" / "audit.json").read_text())["sources"]
    assert sources["captions"]["damaged" if what == "all of a source" else "images"]
    found = {f"{name}/{shard}" for name, source in sources.items() for shard in source["damaged"]}
    assert found == {tar.relative_to(out).as_posix() for tar in bad} and (out / "audit" / "audit.png").is_file()
    assert "what is wrong" in capsys.readouterr().out
    for tar in bad:
        tar.unlink()
    prepare(wanted)


def test_percentiles_of_counts_are_those_of_the_values() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    found = percentiles_of_counts(np.bincount(values, minlength=64))
    assert found["min"] == values.min() and found["max"] == values.max()
    assert abs(found["median"] - np.median(values)) <= 1 and abs(found["90 %"] - np.percentile(values, 90)) <= 1
    assert percentiles_of_counts(np.zeros(4, dtype=np.int64)) == {}


def test_the_writing_of_a_text() -> None:
    assert script_of(["<image>", "красный cat круг"]) == "Cyrillic"
    assert script_of(["赤い車"]) == "Cjk" and script_of(["<image>", "12 + 3"]) == "none"


def test_what_the_data_says_is_shown_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text that is markup, a formula, an escape sequence or a picture's name to those who print and draw it."""
    pairs = []
    for i, text in enumerate(["[/x]", "[bold]:smile:", "$a_$b", "\x1b[31m"] * 3):
        facts = {"caption": text, "LANGUAGE": text, text: text, "url": f"http://[/h]{i}/"}
        pairs.append({"jpg": picture(i), "txt": text.encode(), "json": json.dumps(facts).encode()})
    pairs.append({"jpg": b"[/x]", "txt": b"broken", "json": b"{}"})
    write_img2dataset(tmp_path / "captions", [pairs])
    (tmp_path / "manifest.yaml").write_text("sources: {a: {kind: img2dataset, path: captions}}")
    prepare(config(tmp_path, audit=True))
    said = capsys.readouterr().out
    assert "[/x]" in said and "[bold]:smile:" in said and r"\x1b[31m" in said and "\x1b" not in said
