"""WebDataset shards with an index beside them: write one, open a folder of them, read a record by its number.

    captions/manifest.json                   shards, counts, bytes, SHA-256, what was dropped and why
    captions/00000.tar                       KEY.json {"messages", "kind", "source_id"}, KEY.0.jpg, KEY.1.png, …
    captions/00000.tar.index.safetensors     where each member lies, and each image's width and height

Any WebDataset reader can stream the tars; with the index a record costs one pread instead of a pass over the tar.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_nemo.data.sample import BAD_JSON, Message, Record, SampleError
from vlm_nemo.types import UserError

FORMAT = "vlm_nemo.shard.1"
MANIFEST = "manifest.json"
INDEX_SUFFIX = ".index.safetensors"
OPEN_SHARDS = 256
"""Shards of a source held open at a time; well below the usual limit of 1024 files a process."""
_ROLES = ("system", "user", "assistant")


class ShardImage(NamedTuple):
    """An image to write."""

    data: bytes
    extension: str
    width: int
    height: int


class ShardSample(NamedTuple):
    """A sample to write."""

    key: str
    """Without dots."""
    messages: list[Message]
    kind: str | None
    source_id: str
    images: list[ShardImage]


def index_path(tar: Path) -> Path:
    """00000.tar -> 00000.tar.index.safetensors"""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def write_shard(tar: Path, samples: Iterable[ShardSample]) -> int:
    """Write a tar and its index, atomically (the index last); returns the number of records."""
    import webdataset  # late: it imports torch

    keys: list[str] = []
    sizes: list[list[tuple[int, int]]] = []
    part = tar.with_name(tar.name + ".part")
    with open(part, "wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0.0) as writer:
        for sample in samples:
            content: dict[str, Any] = {"messages": sample.messages, "source_id": sample.source_id}
            if sample.kind is not None:
                content["kind"] = sample.kind
            members: dict[str, Any] = {
                "__key__": sample.key,
                "json": json.dumps(content, ensure_ascii=False).encode(),
            }
            for i, image in enumerate(sample.images):
                members[f"{i}.{image.extension}"] = image.data
            writer.write(members)
            keys.append(sample.key)
            sizes.append([(image.width, image.height) for image in sample.images])
    index = _scan(part, keys, sizes)
    index_part = tar.with_name(tar.name + INDEX_SUFFIX + ".part")
    # One entry: the order in which safetensors writes several changes from run to run
    save_file(index, index_part, metadata={FORMAT: str(part.stat().st_size)})
    index_path(tar).unlink(missing_ok=True)
    part.rename(tar)
    index_part.rename(index_path(tar))
    return len(keys)


def _scan(tar: Path, keys: list[str], sizes: list[list[tuple[int, int]]]) -> dict[str, np.ndarray]:
    """Where the members of a tar that was just written lie."""
    with tarfile.open(tar, "r:") as archive:
        where = {member.name.split(".", 1)[0] + "." + member.name.split(".")[1]: member for member in archive}
    records = [where[f"{key}.json"] for key in keys]
    images = [where[f"{key}.{i}"] for key, own in zip(keys, sizes, strict=True) for i in range(len(own))]
    flat = [size for own in sizes for size in own]
    columns = {
        "record_offset": [member.offset_data for member in records],
        "record_size": [member.size for member in records],
        "image_start": [0, *accumulate(len(own) for own in sizes)],
        "image_offset": [member.offset_data for member in images],
        "image_size": [member.size for member in images],
        "image_width": [width for width, _ in flat],
        "image_height": [height for _, height in flat],
    }
    return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}


class ShardReader:
    """One shard, read by record number. Threads may share it."""

    def __init__(self, tar: Path) -> None:
        """Raises UserError if the tar or its index is missing, or they do not belong together."""
        self.tar = tar
        try:
            with safe_open(index_path(tar), framework="np") as index:
                expected = (index.metadata() or {}).get(FORMAT)
                columns = {name: index.get_tensor(name) for name in index.keys()}
            self._file = open(tar, "rb", buffering=0)
        except (OSError, SafetensorError) as error:
            raise UserError(f"shard {tar} cannot be read ({error}); run `vlm-nemo prepare` again") from None
        size = os.fstat(self._file.fileno()).st_size
        if expected != str(size):
            raise UserError(
                f"shard {tar} has {size} bytes, its index was made for {expected}; run `vlm-nemo prepare` again"
            )
        for what in ("record", "image"):
            offset, length = columns[f"{what}_offset"], columns[f"{what}_size"]
            if len(offset) and (offset.min() < tarfile.BLOCKSIZE or length.min() < 0 or (offset + length).max() > size):
                raise UserError(f"the index of shard {tar} points outside of it; run `vlm-nemo prepare` again")
        # Lists, not arrays: an element of a list is an int already
        self._record_offset = columns["record_offset"].tolist()
        self._record_size = columns["record_size"].tolist()
        self._image_start = columns["image_start"].tolist()
        self._image_offset = columns["image_offset"].tolist()
        self._image_size = columns["image_size"].tolist()
        self._sizes = list(zip(columns["image_width"].tolist(), columns["image_height"].tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._record_offset)

    def record(self, number: int) -> Record:
        """A record without its images' bytes. Raises SampleError ("bad json")."""
        data = self._read(self._record_offset[number], self._record_size[number])
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleError(BAD_JSON, str(error)) from None
        messages = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
            raise SampleError(BAD_JSON, "messages is not a list of {role, content}")
        return Record(
            messages=messages,
            kind=str(content["kind"]) if content.get("kind") is not None else None,
            source_id=str(content.get("source_id", "")),
            sizes=self._sizes[self._image_start[number] : self._image_start[number + 1]],
        )

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        span = range(self._image_start[number], self._image_start[number + 1])
        return [self._read(self._image_offset[i], self._image_size[i]) for i in span]

    def key(self, number: int) -> str:
        """The record's name in the tar, from the member's header, which lies right before its data."""
        header = self._read(self._record_offset[number] - tarfile.BLOCKSIZE, 100)
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").removesuffix(".json")

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f"shard {self.tar} became shorter while it was read; run `vlm-nemo prepare` again")
        return data


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


class ShardFolder:
    """All shards of one source as a sequence of records. Threads may share it."""

    def __init__(self, path: str | Path, key: str = "data.sources") -> None:
        """key: the configuration's name for this folder, for messages.

        Raises UserError if the folder holds no shards, or prepare has not finished there.
        """
        self.path = Path(path)
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            shards = [(str(shard["name"]), int(shard["records"])) for shard in manifest["shards"] if shard["records"]]
            complete = bool(manifest["complete"])
        except (FileNotFoundError, NotADirectoryError):
            shards, complete = [], True
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / MANIFEST} is damaged ({error!r}); run `vlm-nemo prepare` again") from None
        if bad := next((name for name, _ in shards if Path(name).name != name), None):
            raise UserError(f"{self.path / MANIFEST} names the shard {bad!r}, which is not a file of that folder")
        if not complete:
            raise UserError(f"{key}={self.path} is half prepared; run `vlm-nemo prepare` again, it goes on from there")
        if not shards:
            raise UserError(f"{key}={self.path} holds no shards; run `vlm-nemo prepare` or correct the path")
        self._names = [name for name, _ in shards]
        self._ends = list(accumulate(records for _, records in shards))
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, number: int) -> Record:
        """See ShardReader.record."""
        reader, local = self._find(number)
        return reader.record(local)

    def images(self, number: int) -> list[bytes]:
        """See ShardReader.images."""
        reader, local = self._find(number)
        return reader.images(local)

    def key(self, number: int) -> str:
        """Shard and member, as in "00012.tar/000120034"."""
        reader, local = self._find(number)
        return f"{reader.tar.name}/{reader.key(local)}"

    def _find(self, number: int) -> tuple[ShardReader, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = bisect_right(self._ends, number)
        with self._lock:
            reader = self._open.get(shard)
            if reader is None:
                reader = ShardReader(self.path / self._names[shard])
                expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
                if len(reader) != expected:
                    raise UserError(
                        f"shard {reader.tar} holds {len(reader)} records, {MANIFEST} says {expected}; "
                        "run `vlm-nemo prepare` again"
                    )
                self._open[shard] = reader
                # The oldest reader is only let go; a thread that still reads from it keeps its file open
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
        return reader, number - (self._ends[shard - 1] if shard else 0)
