"""img2dataset's output: images with captions, in tars or in folders of files, and a parquet beside each.

    00000.tar or 00000/      KEY.jpg, KEY.txt, KEY.json of each image that arrived
    00000.parquet            a row an address, arrived or not: key, url, caption, status, …, and columns that were kept
                             (LAION: similarity, LANGUAGE, NSFW, punsafe, pwatermark) or added later

An address that gave no image is not a sample. What the parquet, or else the json, says of a sample becomes its facts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.messages import caption_messages
from vlm_nemo.data.raw.tar import Group, read_members, scan_tar
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, attempt, digest, facts_of, shard_image, stamp
from vlm_nemo.data.sample import BAD_JSON, EMPTY_CAPTION, MISSING_IMAGE, SampleError
from vlm_nemo.data.turns import check_images
from vlm_nemo.types import UserError

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif")
_MEMBERS = ("json", "txt", *IMAGE_MEMBERS)
SUCCESS = "success"
_NOT_FACTS = ("key", "status", "error_message", "caption", "txt", "exif", *IMAGE_MEMBERS)


@dataclass(frozen=True, kw_only=True)
class DownloadUnit:
    """Samples `first` to `first + count` of a shard that img2dataset wrote."""

    shard: str
    """A tar, or a folder of files."""
    first: int
    count: int

    def fingerprint(self) -> str:
        shard = Path(self.shard)
        stamps: list[Any] = [stamp(shard), stamp(parquet_of(shard))]
        if shard.is_dir():
            mine = scan_shard(shard)[self.first : self.first + self.count]
            stamps = [[stamp(shard / f"{key}.{extension}") for extension in members] for key, members in mine]
            stamps.append(stamp(parquet_of(shard)))
        return digest("img2dataset", shard.name, stamps, self.first, self.count)

    def read(self) -> Iterator[RawSample | RawDrop]:
        shard = Path(self.shard)
        groups = scan_shard(shard)[self.first : self.first + self.count]
        known = _read_facts(parquet_of(shard), stamp(parquet_of(shard)))
        for key, contents in read_members(shard, groups, _MEMBERS):
            facts = known.get(key.rpartition("/")[2], {})
            yield attempt(f"{shard.name}/{key}", partial(_caption, contents=contents, known=facts))


def parquet_of(shard: Path) -> Path:
    """00000.tar or 00000/ -> 00000.parquet"""
    return shard.with_suffix(".parquet") if shard.suffix == ".tar" else shard.with_name(shard.name + ".parquet")


def list_shards(folder: Path) -> list[Path]:
    """Tars and folders of img2dataset's output, in order.

    Raises UserError if there is none, or if a parquet of img2dataset has neither tar nor folder.
    """
    tars = list(folder.glob("*.tar"))
    folders = [path for path in folder.glob("*") if path.is_dir() and (parquet_of(path).is_file() or _is_files(path))]
    shards = sorted(tars + folders)
    if not shards:
        raise UserError(
            f"{folder} holds no .tar files (nor folders of files); run img2dataset with output_format=webdataset or "
            "files first, or correct `path` in the manifest"
        )
    stems = {parquet_of(shard) for shard in shards}
    for parquet in sorted(folder.glob("*.parquet")):
        if parquet not in stems and (arrived := count_arrived(parquet)):
            raise UserError(
                f"{parquet} names {arrived} images that arrived, {parquet.with_suffix('.tar')} is missing; fetch it "
                "again or move the parquet away"
            )
    return shards


def list_downloads(
    where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map
) -> list[DownloadUnit]:
    """Units of img2dataset's output folder. Raises UserError if it holds no shards, or one is not whole."""
    del options
    shards = list_shards(where["path"])
    units = []
    for shard, samples in zip(shards, apply(count_shard, shards), strict=True):
        for first in range(0, samples, shard_samples):
            units.append(DownloadUnit(shard=str(shard), first=first, count=min(shard_samples, samples - first)))
    return units


def count_shard(shard: Path) -> int:
    """Samples of a shard. Raises UserError if its parquet says that there were more."""
    found = len(scan_shard(shard))
    arrived = count_arrived(parquet_of(shard))
    if arrived is not None and arrived > found:
        raise UserError(
            f"{shard} holds {found} samples, {parquet_of(shard).name} says that {arrived} arrived: it was cut; fetch "
            "it again, or move both away"
        )
    return found


def count_arrived(parquet: Path) -> int | None:
    """Addresses that gave an image; None where there is no parquet or it is not img2dataset's. Raises UserError."""
    table = _read_parquet(parquet, lambda name: name == "status")
    return None if table is None or "status" not in table else table["status"].count(SUCCESS)


def scan_shard(shard: Path) -> list[Group]:
    """Samples of a tar, or of a folder of files (offsets are 0 there). Raises UserError if it is damaged."""
    return _scan_folder(shard, stamp(shard)) if shard.is_dir() else scan_tar(shard)


def urls_of(parquet: Path) -> dict[str, str]:
    """{key: address}; empty where there is no parquet, or it has no such columns. Raises UserError."""
    table = _read_parquet(parquet, lambda name: name in ("key", "url")) or {}
    return {} if len(table) < 2 else {str(key): str(url) for key, url in zip(table["key"], table["url"], strict=True)}


def image_of(members: Any) -> str | None:
    """The extension of the image among a sample's members."""
    return next((extension for extension in IMAGE_MEMBERS if extension in members), None)


def _read_parquet(parquet: Path, wanted: Callable[[str], bool]) -> dict[str, list[Any]] | None:
    """{column: values} of the wanted columns that are there. None where there is no file. Raises UserError."""
    if not parquet.is_file():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(parquet) as file:
            table = file.read(columns=[name for name in file.schema_arrow.names if wanted(name)])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{parquet} cannot be read ({error}): img2dataset was interrupted there; run it again, or move the "
            "parquet and its shard away"
        ) from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


@lru_cache(maxsize=2)
def _read_facts(parquet: Path, stamp: tuple[int, int]) -> dict[str, dict[str, float | str]]:
    """{key: facts}"""
    del stamp
    table = _read_parquet(parquet, lambda name: name == "key" or name.lower() not in _NOT_FACTS) or {}
    if "key" not in table:
        return {}
    rows = zip(*table.values(), strict=True)
    names = list(table)
    facts = {}
    for key, row in zip(table["key"], rows, strict=True):
        facts[str(key)] = facts_of(dict(zip(names, row, strict=True)), _NOT_FACTS)
    return facts


def _is_files(folder: Path) -> bool:
    return folder.name.isdigit() and image_of({path.suffix[1:]: 0 for path in folder.iterdir()}) is not None


@lru_cache(maxsize=2)
def _scan_folder(folder: Path, stamp: tuple[int, int]) -> list[Group]:
    """Samples of a folder of files, as of a tar; offsets are 0."""
    del stamp
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            key, _, extension = entry.name.partition(".")
            if entry.is_file() and extension:
                groups.setdefault(key, {})[extension] = (0, entry.stat().st_size)
    return list(groups.items())


def _caption(name: str, contents: dict[str, bytes], known: dict[str, float | str]) -> RawSample:
    """An image-text pair: the user shows the image, the assistant says the caption."""
    try:
        said = json.loads(contents.get("json", b"{}"))
        text = contents["txt"].decode("utf-8") if "txt" in contents else said.get("caption")
        facts = facts_of(said, _NOT_FACTS) | known
    except (ValueError, AttributeError, RecursionError) as error:
        raise SampleError(BAD_JSON, str(error)) from None
    if not isinstance(text, str):
        raise SampleError(EMPTY_CAPTION, "no caption")
    messages = caption_messages(text)
    extension = image_of(contents)
    if extension is None:
        raise SampleError(MISSING_IMAGE, f"members: {', '.join(contents)}")
    check_images(messages, 1)
    return RawSample(name, messages, None, [shard_image(contents[extension])], facts)
