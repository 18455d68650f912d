"""Folders as `energon prepare` leaves them: what .nv-meta says, and samples through prepare."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.raw_data import add_member, picture
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.raw.energon import energon_sample, expand_braces, read_energon, split_field
from vlm_nemo.data.sample import BAD_JSON, BROKEN_IMAGE, EMPTY_CAPTION, MISSING_IMAGE, NO_LABEL, SampleError
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.types import UserError

CAPTIONS = {"image": "jpg,png", "caption": "json[caption][0],txt"}
VQA = {"image": "jpg", "context": "json[question]", "answers": "json[answers]", "answer_weights": "json[weights]"}


def write_energon(
    folder: Path, shards: list[list[dict[str, bytes]]], sample_type: str, field_map: dict[str, str], **splits: Any
) -> Path:
    """Tars part_0/shard_000.tar …, keys 0, 1, … counted over all of them, and .nv-meta of megatron-energon 7.4.1."""
    (folder / "part_0").mkdir(parents=True)
    counts, number = {}, 0
    for s, samples in enumerate(shards):
        tar = f"part_0/shard_{s:03d}.tar"
        with tarfile.open(folder / tar, "w") as archive:
            for sample in samples:
                for extension, data in sample.items():
                    add_member(archive, f"{number}.{extension}", data)
                number += 1
        counts[tar] = len(samples)
    meta = folder / ".nv-meta"
    meta.mkdir()
    dataset = {"sample_type": {"__module__": "megatron.energon", "__class__": sample_type}, "field_map": field_map}
    (meta / "dataset.yaml").write_text(yaml.dump(dataset, sort_keys=False))
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    parts = {"train": [f"part_0/shard_{{000..{len(shards) - 1:03d}}}.tar"], "val": [], "test": []}
    (meta / "split.yaml").write_text(yaml.dump({"split_parts": parts, "exclude": [], **splits}, sort_keys=False))
    return folder


def prepared(folder: Path, **source: Any) -> dict[str, Any]:
    manifest = folder.parent / "manifest.yaml"
    manifest.write_text(yaml.dump({"sources": {"web": {"kind": "energon", "path": folder.name, **source}}}))
    out = str(folder.parent / "out")
    return prepare(PrepareConfig(manifest=str(manifest), out=out, shard_samples=3, workers=1))["web"]


def test_captions_through_prepare(tmp_path: Path) -> None:
    good = {"jpg": picture(1), "json": json.dumps({"caption": ["a red ring", "no"]}).encode()}
    bad = [
        ({"json": good["json"]}, MISSING_IMAGE),
        (good | {"jpg": b"<html>"}, BROKEN_IMAGE),
        (good | {"json": b'{"caption": ["  "]}'}, EMPTY_CAPTION),
        (good | {"json": b"{"}, BAD_JSON),
        (good | {"json": b'{"caption": "text"}'}, BAD_JSON),
        ({"jpg": good["jpg"]}, BAD_JSON),
    ]
    plain = {"png": picture(2, form="PNG"), "txt": b" from the text "}
    write_energon(
        tmp_path / "web", [[good, plain], [sample for sample, _ in bad] + [good]], "CaptioningSample", CAPTIONS
    )
    done = prepared(tmp_path / "web")
    assert done["records"] == 3 and done["dropped"] == {
        reason: [r for _, r in bad].count(reason) for reason in sorted({r for _, r in bad})
    }
    folder = ShardFolder(tmp_path / "out" / "web")
    records = [folder.record(number) for number in range(len(folder))]
    assert [r.messages[1]["content"] for r in records] == ["a red ring", "from the text", "a red ring"]
    assert [r.source_id for r in records] == [f"part_0/shard_00{s}.tar/{key}" for s, key in ((0, 0), (0, 1), (1, 8))]
    assert folder.images(1) == [plain["png"]]


def test_excluded_samples_and_shards_are_left_out(tmp_path: Path) -> None:
    good = {"jpg": picture(1), "txt": b"a ring"}
    exclude = ["part_0/shard_001.tar", "part_0/shard_002.tar/{6,7}"]
    write_energon(tmp_path / "web", [[good] * 3] * 3, "CaptioningSample", CAPTIONS, exclude=exclude)
    assert prepared(tmp_path / "web")["records"] == 3 + 1
    folder = ShardFolder(tmp_path / "out" / "web")
    assert folder.record(3).source_id == "part_0/shard_002.tar/8"


def test_another_split(tmp_path: Path) -> None:
    good = {"jpg": picture(1), "txt": b"a ring"}
    parts = {"train": ["part_0/shard_000.tar"], "val": ["part_0/shard_001.tar"]}
    write_energon(tmp_path / "web", [[good] * 3, [good] * 2], "CaptioningSample", CAPTIONS, split_parts=parts)
    assert prepared(tmp_path / "web", split="val")["records"] == 2
    with pytest.raises(UserError, match=r"split\.yaml has no split test; it has train, val"):
        prepared(tmp_path / "web", split="test")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"question": "Hue?", "answers": ["blue", "red", "red"]}, "red"),
        ({"question": "Hue?", "answers": ["blue", "red", "red"], "weights": [0.9, 0.1, 0.2]}, "blue"),
        ({"question": "Hue?", "answers": ["blue", "red"]}, "blue"),
        ({"question": "Hue?", "answers": "green"}, "green"),
        ({"question": "Hue?", "answers": []}, NO_LABEL),
        ({"question": "Hue?", "answers": None}, NO_LABEL),
        ({"question": " ", "answers": ["red"]}, NO_LABEL),
        ({"question": "Hue?", "answers": ["red"], "weights": [1, 2]}, BAD_JSON),
        ({"question": 3, "answers": ["red"]}, BAD_JSON),
        ({"answers": ["red"]}, BAD_JSON),
    ],
)
def test_questions(tmp_path: Path, content: Any, said: str) -> None:
    meta = read_energon(write_energon(tmp_path / "web", [[]], "VQASample", VQA))
    assert meta.members == {"jpg", "json"}
    contents = {"jpg": b"image", "json": json.dumps(content).encode()}
    try:
        messages, images = energon_sample(meta, contents)
    except SampleError as error:
        assert error.reason == said
    else:
        assert images == [b"image"]
        assert messages == [{"role": "user", "content": "<image>\nHue?"}, {"role": "assistant", "content": said}]


def test_text_alone(tmp_path: Path) -> None:
    meta = read_energon(write_energon(tmp_path / "web", [[]], "TextSample", {"text": "txt"}))
    messages, images = energon_sample(meta, {"txt": "  naïve text\n".encode()})
    assert images == [] and messages[-1] == {"role": "assistant", "content": "naïve text"}


def test_older_names_are_read(tmp_path: Path) -> None:
    folder = write_energon(tmp_path / "web", [[]], "CaptioningSample", CAPTIONS)
    meta = folder / ".nv-meta"
    old = {"__module__": "megatron.energon", "__class__": "CaptioningWebdataset", "field_map": CAPTIONS}
    (meta / "dataset.yaml").write_text(yaml.dump(old))
    (meta / ".info.yaml").write_text(yaml.dump(json.loads((meta / ".info.json").read_text())))
    (meta / ".info.json").unlink()
    (meta / "split.json").write_text(json.dumps(yaml.safe_load((meta / "split.yaml").read_text())))
    (meta / "split.yaml").unlink()
    found = read_energon(folder)
    assert found.sample_type == "CaptioningSample" and found.counts == {"part_0/shard_000.tar": 0}


def test_files_may_come_from_elsewhere(tmp_path: Path) -> None:
    folder = write_energon(tmp_path / "web", [[], []], "CaptioningSample", CAPTIONS)
    elsewhere = read_energon("s3://bucket/web", read=lambda name: (folder / name).read_bytes())
    assert elsewhere == read_energon(folder)
    assert elsewhere.tars == ("part_0/shard_000.tar", "part_0/shard_001.tar")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.yaml", {"sample_type": {"__class__": "VideoSample"}}, "VideoSample is not read; known are Caption"),
        ("dataset.yaml", {"__class__": "CrudeWebdataset"}, "CrudeWebdataset is not read"),
        (
            "dataset.yaml",
            {"sample_type": {"__class__": "VQASample"}, "sample_loader": "sample_loader.py:sample_loader"},
            "has no field_map .*Python code, which is not run",
        ),
        (
            "dataset.yaml",
            {"sample_type": {"__class__": "VQASample"}, "field_map": {"image": "jpg"}},
            "no context, answers",
        ),
        (
            "dataset.yaml",
            {"sample_type": {"__class__": "TextSample"}, "field_map": {"text": "json[a"}},
            r"'json\[a' is not NAME",
        ),
        ("split.yaml", {"split_parts": {"train": ["../x.tar"]}}, "names ../x.tar, which lies outside"),
        ("split.yaml", {"split_parts": {"train": ["x.tgz"]}}, "only plain .tar files"),
        ("split.yaml", {"split_parts": {"train": ["x.tar"]}}, "no count for x.tar"),
        ("split.yaml", {"split_parts": {"train": []}}, "split train holds no shards"),
        ("split.yaml", None, "split.yaml holds a NoneType, not a table"),
        (".info.json", {"shard_counts": {"part_0/shard_000.tar": 7}}, "holds 1 samples, energon counted 7"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    good = {"jpg": picture(1), "txt": b"a ring"}
    folder = write_energon(tmp_path / "web", [[good]], "CaptioningSample", CAPTIONS)
    (folder / ".nv-meta" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        prepared(folder)


def test_a_folder_that_energon_has_not_seen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no dataset\.yaml; run `energon prepare`"):
        read_energon(tmp_path)


def test_fields_and_braces() -> None:
    assert split_field("jpg, json[a][0]") == (("jpg",), ("json", "a", "0"))
    assert expand_braces("a{08..10}/{x,y}.tar") == [f"a{n}/{c}.tar" for n in ("08", "09", "10") for c in "xy"]
    assert expand_braces("{2..0}") == ["2", "1", "0"] and expand_braces("plain.tar") == ["plain.tar"]
    assert expand_braces("{0..4..2}") == ["0", "2", "4"]
