"""Lengths that prepare writes: those of the tokenizer and template, kept, made anew where the texts are new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.raw_data import SPEC, good_rows, picture, write_img2dataset, write_llava, write_manifest
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.config import LayoutConfig, PrepareConfig
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.lengths import lengths_path
from vlm_nemo.data.prepare.convert import sha256
from vlm_nemo.data.prepare.measure import fingerprint_of, mixed_lengths, sample_lengths
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.storage.folders import open_folder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    pairs = [{"jpg": picture(i), "txt": f"{i} red circles".encode()} for i in range(9)]
    write_img2dataset(tmp_path / "captions", [pairs])
    write_llava(tmp_path, good_rows(10))
    write_manifest(tmp_path)
    return tmp_path


def config(folder: Path, **changes: Any) -> PrepareConfig:
    given = {"manifest": str(folder / "manifest.yaml"), "out": str(folder / "out"), "shard_samples": 4, "workers": 1}
    return PrepareConfig(**(given | {"image_size": 28, "patch_size": 14} | changes))


def test_lengths_are_those_of_the_conversations(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = prepare(config(raw, tokenizer_vocab=300, template="short"))
    said = capsys.readouterr().err
    assert "instruct: with 4 tokens an image, capacity 4096 fills to" in said and "all sources: with" in said
    tokenizer = Tokenizer(raw / "out" / "tokenizer")
    fingerprint = fingerprint_of(str(raw / "out" / "tokenizer"), "short", LayoutConfig())
    for name in ("captions", "instruct"):
        folder = open_folder(str(raw / "out" / name))
        counted = folder.text_tokens(fingerprint)
        assert counted is not None
        for number in range(len(folder)):
            record = folder.record(number)
            images = [plain(0)] * len(record.sizes)
            assert counted[number] == len(
                encode_conversation(record.messages, tokenizer, TEMPLATES["short"], images).tokens
            )
        note = done[name]["lengths"][fingerprint]
        assert note["tokens"] == counted.sum() and note["template"] == "short"
        for shard in done[name]["shards"]:
            path = lengths_path(raw / "out" / name / shard["name"], fingerprint)
            assert sha256(path) == shard["lengths"][fingerprint]["sha256"]
        drawn = sample_lengths(raw / "out" / name, done[name], fingerprint, SPEC, 1000)
        expected = [counted[i] + 4 * len(folder.sizes(i)) for i in range(len(folder))]
        assert drawn.tolist() == expected


def test_a_second_tokenizer_adds_its_lengths_and_nothing_else(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(raw, tokenizer_vocab=300))
    other = raw / "other"
    shutil.copytree(raw / "out" / "tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(content))
    stamps = {path: path.stat().st_mtime_ns for path in raw.glob("out/*/*.tar*")}
    capsys.readouterr()
    second = prepare(config(raw, tokenizer=str(other), template="plain"))
    assert capsys.readouterr().err.count("reused as it was") == 2
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for manifest in second.values():
        assert len(manifest["lengths"]) == 2
        first, last = manifest["lengths"].values()
        assert {first["template"], last["template"]} == {"vicuna", "plain"}
    assert prepare(config(raw, tokenizer=str(other), template="plain")) == second
    assert prepare(config(raw))["captions"] == second["captions"]  # lengths stay where nobody asks for any


def test_new_texts_are_measured_anew(raw: Path) -> None:
    prepare(config(raw, tokenizer_vocab=300))
    tokenizer = str(raw / "fixed")
    shutil.copytree(raw / "out" / "tokenizer", tokenizer)
    before = prepare(config(raw, tokenizer=tokenizer))["instruct"]
    rows = good_rows(10)
    rows[0]["conversations"][1]["value"] = "much longer than it was before"
    write_llava(raw, rows)
    after = prepare(config(raw, tokenizer=tokenizer))["instruct"]
    (fingerprint,) = set(before["lengths"]) & set(after["lengths"])
    assert after["lengths"][fingerprint]["tokens"] > before["lengths"][fingerprint]["tokens"]
    counted = open_folder(str(raw / "out" / "instruct")).text_tokens(fingerprint)
    assert counted is not None and counted.sum() == after["lengths"][fingerprint]["tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "vicuna2"}, "template=vicuna2 is unknown; choose one of"),
        ({"tokenizer": "nowhere"}, "nowhere has no tokenizer.json"),
        ({"tokenizer": "x", "tokenizer_vocab": 300}, "name two tokenizers"),
        ({"capacity": 0}, "capacity=0 must be at least 1"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_written(raw: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(raw, **changes))
    assert not (raw / "out").exists()


def test_a_mix_has_as_many_of_each_as_its_share() -> None:
    lengths = {"a": np.full(100, 1), "b": np.full(100, 2), "c": np.zeros(0, dtype=np.int64)}
    mixed = mixed_lengths(lengths, {"a": 1000, "b": 250, "c": 7})
    assert (mixed == 1).sum() == 100 and (mixed == 2).sum() == 25


@pytest.mark.parametrize("pattern", ["*.lengths-*", "*.index.safetensors", "excluded.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_what_is_damaged_beside_a_shard_is_made_again(raw: Path, pattern: str, damage: str) -> None:
    """Training says "run prepare again": then prepare has to mend it."""
    shutil.copytree(_trained(raw), raw / "fixed")
    text = (raw / "manifest.yaml").read_text()
    (raw / "manifest.yaml").write_text(text.replace("path: captions", "path: captions, drop_duplicates: true"))
    asked = config(raw, tokenizer=str(raw / "fixed"))
    before = prepare(asked)
    assert pattern != "excluded.safetensors" or "excluded" in before["captions"]
    found = {path: path.read_bytes() for path in (raw / "out" / "captions").glob(pattern)}
    for path, data in found.items():
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert found and prepare(asked) == before
    assert {path: path.read_bytes() for path in found} == found
    folder = open_folder(str(raw / "out" / "captions"))
    assert folder.text_tokens(fingerprint_of(str(raw / "fixed"), "vicuna", LayoutConfig())) is not None
    assert [folder.sizes(i) for i in range(len(folder))] == [folder.record(i).sizes for i in range(len(folder))]


def _trained(raw: Path) -> Path:
    prepare(config(raw, tokenizer_vocab=300))
    return raw / "out" / "tokenizer"
