"""WebDataset shards with an index beside them: open a folder of them, read a record by its number.

    captions/manifest.json                   shards, counts, bytes, SHA-256, what was dropped and why
    captions/00000.tar                       KEY.json {"messages", "kind", "source_id"}, KEY.0.jpg, KEY.1.png, …
    captions/00000.tar.index.safetensors     where each member lies, each image's width, height and hash
    captions/00000.tar.lengths-FINGERPRINT.safetensors    tokens of each text, for one tokenizer and template
    captions/excluded.safetensors            records that are passed over (duplicates)

Any WebDataset reader can stream the tars; with the index a record costs one pread instead of a pass over the tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_nemo.data.sample import BAD_JSON, Record, SampleError
from vlm_nemo.types import UserError

FORMAT = "vlm_nemo.shard.2"
MANIFEST = "manifest.json"
EXCLUDED = "excluded.safetensors"
"""int64 `records`, sorted: numbers to pass over, counted over all shards; MANIFEST's `excluded` has its `sha256`."""
INDEX_SUFFIX = ".index.safetensors"
LENGTHS_INFIX = ".lengths-"
HASH_BYTES = 16
"""blake2b-128 of an encoded image."""
OPEN_SHARDS = 256
"""Shards of a source held open at a time; well below the usual limit of 1024 files a process."""
_AGAIN = "run `vlm-nemo prepare` again"
_ROLES = ("system", "user", "assistant")


def index_path(tar: Path) -> Path:
    """00000.tar -> 00000.tar.index.safetensors"""
    return tar.with_name(tar.name + INDEX_SUFFIX)


class ShardReader:
    """One shard, read by record number. Threads may share it."""

    def __init__(self, tar: Path) -> None:
        """Raises UserError if the tar or its index is missing, or they do not belong together."""
        self.tar = tar
        try:
            with safe_open(index_path(tar), framework="np") as index:
                made_for = index.metadata() or {}
                columns = {name: index.get_tensor(name) for name in index.keys() if name != "image_hash"}
            self._file = open(tar, "rb", buffering=0)
        except (OSError, SafetensorError) as error:
            raise UserError(f"shard {tar} cannot be read ({error}); {_AGAIN}") from None
        size = os.fstat(self._file.fileno()).st_size
        if FORMAT not in made_for:
            raise UserError(f"shard {tar} was written by another version (not {FORMAT}); {_AGAIN}")
        if made_for[FORMAT] != str(size):
            raise UserError(f"shard {tar} has {size} bytes, its index was made for {made_for[FORMAT]}; {_AGAIN}")
        for what in ("record", "image"):
            offset, length = columns[f"{what}_offset"], columns[f"{what}_size"]
            if len(offset) and (offset.min() < tarfile.BLOCKSIZE or length.min() < 0 or (offset + length).max() > size):
                raise UserError(f"the index of shard {tar} points outside of it; {_AGAIN}")
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
        return parse_record(data, self.sizes(number))

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        span = range(self._image_start[number], self._image_start[number + 1])
        return [self._read(self._image_offset[i], self._image_size[i]) for i in span]

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """Width and height of a record's images, pixels; nothing is read."""
        return self._sizes[self._image_start[number] : self._image_start[number + 1]]

    def key(self, number: int) -> str:
        """The record's name in the tar, from the member's header, which lies right before its data."""
        header = self._read(self._record_offset[number] - tarfile.BLOCKSIZE, 100)
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").removesuffix(".json")

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f"shard {self.tar} became shorter while it was read; {_AGAIN}")
        return data


def parse_record(data: bytes, sizes: list[tuple[int, int]]) -> Record:
    """What a shard's json member says. Raises SampleError ("bad json")."""
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
        sizes=sizes,
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


class ShardFolder:
    """All shards of one source as a sequence of records. Threads may share it."""

    def __init__(self, path: str | Path, key: str = "data.sources") -> None:
        """key: the configuration's name for this folder, for messages.

        Raises UserError if the folder holds no shards, or prepare has not finished there.
        """
        self.path = str(path)
        self._folder = Path(path)
        try:
            manifest = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))
            shards = [(str(shard["name"]), int(shard["records"])) for shard in manifest["shards"] if shard["records"]]
            complete = bool(manifest["complete"])
            excluded = str(manifest["excluded"]["sha256"]) if "excluded" in manifest else None
            version = str(manifest["format"])
        except (FileNotFoundError, NotADirectoryError):
            shards, complete, excluded, version = [], True, None, FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._folder / MANIFEST} is damaged ({error!r}); {_AGAIN}") from None
        if version != FORMAT:
            raise UserError(f"{key}={path} was prepared by another version ({version}, not {FORMAT}); {_AGAIN}")
        if bad := next((name for name, _ in shards if Path(name).name != name), None):
            raise UserError(f"{self._folder / MANIFEST} names the shard {bad!r}, which is not a file of that folder")
        if not complete:
            raise UserError(f"{key}={path} is half prepared; {_AGAIN}, it goes on from there")
        if not shards:
            raise UserError(f"{key}={path} holds no shards; run `vlm-nemo prepare` or correct the path")
        self._names = [name for name, _ in shards]
        self._ends = list(accumulate(records for _, records in shards))
        self._excluded = None if excluded is None else self._read_excluded(excluded)
        # Records that remain before each one that is excluded: one bisection finds the n-th that remains
        self._gaps = [] if self._excluded is None else (self._excluded - np.arange(len(self._excluded))).tolist()
        self._len = self._ends[-1] - len(self._gaps)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._len

    def record(self, number: int) -> Record:
        """See ShardReader.record."""
        reader, local = self._find(number)
        return reader.record(local)

    def images(self, number: int) -> list[bytes]:
        """See ShardReader.images."""
        reader, local = self._find(number)
        return reader.images(local)

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """See ShardReader.sizes."""
        reader, local = self._find(number)
        return reader.sizes(local)

    def key(self, number: int) -> str:
        """Shard and member, as in "00012.tar/000120034"."""
        reader, local = self._find(number)
        return f"{reader.tar.name}/{reader.key(local)}"

    def text_tokens(self, fingerprint: str) -> np.ndarray | None:
        """[len] int32: tokens of each record's text (see lengths.py); None if a shard was not measured for it.

        Raises UserError if what lies there belongs to other shards.
        """
        parts = []
        for shard, name in enumerate(self._names):
            path = self._folder / f"{name}{LENGTHS_INFIX}{fingerprint}.safetensors"
            expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
            if not path.is_file():
                return None
            try:
                with safe_open(path, framework="np") as lengths:
                    part = lengths.get_tensor("text_tokens")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from None
            if part.shape != (expected,) or part.dtype != np.int32:
                raise UserError(f"{path} is {part.dtype} {part.shape}, the shard has {expected} records; {_AGAIN}")
            parts.append(part)
        tokens = np.concatenate(parts)
        return tokens if self._excluded is None else np.delete(tokens, self._excluded)

    def _read_excluded(self, sha256: str) -> np.ndarray:
        path = self._folder / EXCLUDED
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise UserError(f"{path} is not the file that {MANIFEST} names; {_AGAIN}")
            with safe_open(path, framework="np") as content:
                records = content.get_tensor("records")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from None
        if len(records) and not (0 <= records[0] and records[-1] < self._ends[-1] and (np.diff(records) > 0).all()):
            raise UserError(f"{path} does not hold sorted numbers of {self._ends[-1]} records; {_AGAIN}")
        if len(records) == self._ends[-1]:
            raise UserError(f"{path} excludes every record; {_AGAIN}")
        return records

    def _find(self, number: int) -> tuple[ShardReader, int]:
        if not 0 <= number < self._len:
            raise IndexError(f"record {number} of {self._len}")
        if self._gaps:
            number += bisect_right(self._gaps, number)
        shard = bisect_right(self._ends, number)
        with self._lock:
            reader = self._open.get(shard)
            if reader is None:
                reader = ShardReader(self._folder / self._names[shard])
                expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
                if len(reader) != expected:
                    raise UserError(
                        f"shard {reader.tar} holds {len(reader)} records, {MANIFEST} says {expected}; {_AGAIN}"
                    )
                self._open[shard] = reader
                # The oldest reader is only let go; a thread that still reads from it keeps its file open
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
        return reader, number - (self._ends[shard - 1] if shard else 0)
