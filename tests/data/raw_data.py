"""Small raw data sets in the layouts that prepare reads, whole ones and broken ones."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import DataConfig, LayoutConfig, PackConfig, PrepareConfig, SourceConfig
from vlm_nemo.data.layout.cut import Pixels
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.lengths import fingerprint, lengths_path, measure, write_lengths
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.sample import Record, SampleError
from vlm_nemo.data.storage.shards import FORMAT, MANIFEST, ShardFolder, index_path
from vlm_nemo.data.tokenizer import Tokenizer

SPEC = image_spec(LayoutConfig(), size=32, patch=16)


def picture(seed: int, size: tuple[int, int] = (40, 30), form: str = "JPEG", mode: str = "RGB", **how: Any) -> bytes:
    """A smooth random picture, encoded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, form, **({"quality": 92} if form == "JPEG" else {}), **how)
    return stream.getvalue()


def pixels_of(patches: Pixels, grid: tuple[int, int]) -> Pixels:
    """Patches of one view put together again: [P, p*p*3] -> [H, W, 3]."""
    rows, columns = grid
    side = math.isqrt(patches.shape[1] // 3)
    return patches.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, -1, 3)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_img2dataset(folder: Path, shards: list[list[dict[str, bytes]]]) -> None:
    """Each sample is {extension: bytes}; the json member is made up where it is not given."""
    folder.mkdir(parents=True, exist_ok=True)
    for s, samples in enumerate(shards):
        with tarfile.open(folder / f"{s:05d}.tar", "w") as archive:
            for i, sample in enumerate(samples):
                key = f"{s:05d}{i:04d}"
                facts = {
                    "caption": sample.get("txt", b"").decode(errors="replace"),
                    "url": f"http://h/{key}",
                    "key": key,
                }
                facts |= {"status": "success", "error_message": None, "width": 40, "height": 30, "sha256": "0" * 64}
                members = {"json": json.dumps(facts).encode()} | sample
                for extension in ("jpg", "png", "txt", "json"):
                    if extension in members:
                        add_member(archive, f"{key}.{extension}", members[extension])


def turns(*texts: str) -> list[dict[str, str]]:
    """LLaVA's conversations, human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def good_rows(count: int) -> list[dict[str, Any]]:
    """One image, two images, several turns, text only, in turn."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        answer = "red " * (1 + i * 7 % 23) + str(i)
        row: dict[str, Any] = {"id": f"q{i}"}
        if i % 4 == 0:
            row |= {"image": f"{i % 9}.jpg", "conversations": turns("<image>\nWhat colour?", answer), "kind": "colour"}
        elif i % 4 == 1:
            row |= {
                "image": [f"{i % 9}.jpg", f"{(i + 1) % 9}.jpg"],
                "conversations": turns("<image>\n<image>\nWhich is larger?", answer),
            }
        elif i % 4 == 2:
            row |= {"image": f"{i % 9}.jpg", "conversations": turns("<image>\nShape?", "round", "Count?", answer)}
        else:
            row |= {"conversations": turns("Say red.", answer)}
        rows.append(row)
    return rows


def write_llava(folder: Path, rows: list[Any], images: int = 9) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / "images" / f"{i}.jpg").write_bytes(picture(100 + i))
    (folder / "instruct.json").write_text(json.dumps(rows))


def write_manifest(folder: Path, kinds: tuple[str, ...] = ("captions", "instruct")) -> Path:
    entries = {
        "captions": "  captions: {kind: img2dataset, path: captions}\n",
        "instruct": "  instruct: {kind: llava, json: instruct.json, images: images}\n",
    }
    path = folder / "manifest.yaml"
    path.write_text("name: test\nsources:\n" + "".join(entries[kind] for kind in kinds))
    return path


def make_prepared(folder: Path, captions: int = 60, rows: int = 80, vocab: int = 320) -> Path:
    """Raw data, prepared; returns the folder with captions/, instruct/ and tokenizer/."""
    pairs = [{"jpg": picture(i), "txt": f"a picture of {i} red circles".encode()} for i in range(captions)]
    write_img2dataset(folder / "captions", [pairs[: captions // 2], pairs[captions // 2 :]])
    write_llava(folder, good_rows(rows))
    out = folder / "out"
    prepare(
        PrepareConfig(
            manifest=str(write_manifest(folder)), out=str(out), shard_samples=25, workers=1, tokenizer_vocab=vocab
        )
    )
    return out


def data_config(prepared: Path, **changes: Any) -> DataConfig:
    """Both sources of `make_prepared`."""
    given: dict[str, Any] = {
        "sources": {
            "captions": SourceConfig(path=str(prepared / "captions"), weight=1.0),
            "instruct": SourceConfig(path=str(prepared / "instruct"), weight=2.0),
        },
        "tokenizer": str(prepared / "tokenizer"),
        "template": "short",
        "pack": PackConfig(capacity=256, pool=16),
        "global_packs": 4,
    }
    return DataConfig(**(given | changes))


def finish_folder(folder: Path, records: list[int]) -> None:
    """The manifest of shards that a test wrote itself, records[i] in shard i."""
    shards = []
    for tar, count in zip(sorted(folder.glob("*.tar")), records, strict=True):
        digests = {
            key: hashlib.sha256(path.read_bytes()).hexdigest()
            for key, path in (("sha256", tar), ("index_sha256", index_path(tar)))
        }
        shards.append({"name": tar.name, "records": count, "bytes": tar.stat().st_size, **digests})
    total = sum(shard["bytes"] for shard in shards)
    manifest = {"format": FORMAT, "complete": True, "bytes": total, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write_all_lengths(prepared: Path, template: str = "short", tokenizer: Tokenizer | None = None) -> None:
    """Put the lengths beside every shard of every source in a folder."""
    tokenizer = tokenizer or Tokenizer(prepared / "tokenizer")
    name = fingerprint(tokenizer, TEMPLATES[template], LayoutConfig())
    for manifest in prepared.glob(f"*/{MANIFEST}"):
        folder = ShardFolder(manifest.parent)
        records = [_record_or_error(folder, i) for i in range(len(folder))]
        lengths = measure(records, tokenizer, TEMPLATES[template], LayoutConfig())
        start = 0
        for shard in json.loads(manifest.read_text())["shards"]:
            end = start + shard["records"]
            write_lengths(lengths_path(manifest.parent / shard["name"], name), lengths[start:end])
            start = end


def _record_or_error(folder: ShardFolder, number: int) -> Record | SampleError:
    try:
        return folder.record(number)
    except SampleError as error:
        return error
