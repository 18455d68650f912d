"""WebDataset shards with an index beside them: open a folder of them, read a record by its number.

    captions/manifest.json                   shards, counts, bytes, SHA-256, what was dropped and why
    captions/00000.tar                       KEY.json {"messages", "kind", "source_id", "facts"}, KEY.0.jpg, …
    captions/00000.tar.index.safetensors     where each member lies, each image's width, height and hash
    captions/00000.tar.lengths-FINGERPRINT.safetensors    tokens of each text, for one tokenizer and template
    captions/excluded.safetensors            records that are passed over (duplicates)

Any WebDataset reader can stream the tars; with the index a record costs one pread instead of a pass over the tar.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.sample import BAD_JSON, Record, SampleError
from vlm_nemo.data.storage.cache import Cache, CachedStore
from vlm_nemo.data.storage.numbered import NumberedFolder, digest
from vlm_nemo.data.storage.store import File, LocalStore, MissingFile, Store
from vlm_nemo.types import UserError

FORMAT = "vlm_nemo.shard.2"
MANIFEST = "manifest.json"
EXCLUDED = "excluded.safetensors"
"""int64 `records`, sorted: numbers to pass over, counted over all shards; MANIFEST's `excluded` has its `sha256`."""
INDEX_SUFFIX = ".index.safetensors"
LENGTHS_INFIX = ".lengths-"
HASH_BYTES = 16
"""blake2b-128 of an encoded image."""
_AGAIN = "run `vlm-nemo prepare` again"
_SIDES = ("width", "height")
_decode = json.JSONDecoder().decode
_ROLES = ("system", "user", "assistant")


def index_path(tar: Path) -> Path:
    """00000.tar -> 00000.tar.index.safetensors"""
    return tar.with_name(tar.name + INDEX_SUFFIX)


class ShardReader:
    """One shard, read by record number. Threads may share it."""

    def __init__(self, tar: Path | File, index: bytes | None = None) -> None:
        """tar: a file of a store, with the bytes of its index; or a path, beside which the index lies.

        Raises UserError if one cannot be read, or they do not belong together.
        """
        if isinstance(tar, Path):
            store, name = LocalStore(tar.parent), tar.name
            tar, index = store.open(name), store.read_all(name + INDEX_SUFFIX)
        assert index is not None
        where = tar.where
        columns = read_index(index, where)
        made_for = int(columns.pop("tar_size")[0])
        if made_for != tar.size:
            raise UserError(f"shard {where} has {tar.size} bytes, its index was made for {made_for}; {_AGAIN}")
        for what in ("record", "image"):
            offset, length = columns[f"{what}_offset"], columns[f"{what}_size"]
            if len(offset) and (
                offset.min() < tarfile.BLOCKSIZE or length.min() < 0 or (offset + length).max() > made_for
            ):
                raise UserError(f"the index of shard {where} points outside of it; {_AGAIN}")
        self.where = where
        self._tar = tar
        # array, not NumPy's: an element is an int already; not lists, which take five times as much
        self._record_offset, self._record_size, self._image_start, self._image_offset, self._image_size = (
            array("q", columns[name].astype(np.int64).tobytes())
            for name in ("record_offset", "record_size", "image_start", "image_offset", "image_size")
        )
        self._width, self._height = (array("i", columns[f"image_{side}"].astype(np.int32).tobytes()) for side in _SIDES)

    def __len__(self) -> int:
        return len(self._record_offset)

    def record(self, number: int) -> Record:
        """A record without its images' bytes. Raises SampleError ("bad json")."""
        span = range(self._image_start[number], self._image_start[number + 1])
        data = self._read(self._record_offset[number], self._record_size[number])
        return parse_record(data, [(self._width[i], self._height[i]) for i in span])

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        span = range(self._image_start[number], self._image_start[number + 1])
        return [self._read(self._image_offset[i], self._image_size[i]) for i in span]

    def key(self, number: int) -> str:
        """The record's name, as in "00012.tar/000120034": from the member's header, right before its data."""
        header = self._read(self._record_offset[number] - tarfile.BLOCKSIZE, 100)
        key = header.split(b"\0", 1)[0].decode("utf-8", "replace").removesuffix(".json")
        return f"{self.where.rpartition('/')[2]}/{key}"

    def _read(self, offset: int, size: int) -> bytes:
        return self._tar.read(offset, size)


def read_index(data: bytes, where: str) -> dict[str, np.ndarray]:
    """The columns of an index, and `tar_size`, the length of the tar that it was made for. Raises UserError.

    where: the tar, for messages.
    """
    try:
        columns = load(data)
    except SafetensorError as error:
        raise UserError(f"shard {where} cannot be read (its index: {error}); {_AGAIN}") from None
    made_for = read_metadata(data)
    if FORMAT not in made_for:
        raise UserError(f"shard {where} was written by another version (not {FORMAT}); {_AGAIN}")
    columns["tar_size"] = np.array([int(made_for[FORMAT])])
    return columns


def read_metadata(data: bytes) -> dict[str, str]:
    """The free text of a safetensors file that could be loaded."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def parse_record(data: bytes, sizes: list[tuple[int, int]]) -> Record:
    """What a shard's json member says. Raises SampleError ("bad json")."""
    try:
        content = _decode(data.decode())  # a third faster than json.loads, which looks for other encodings
    except (ValueError, RecursionError) as error:
        raise SampleError(BAD_JSON, str(error)) from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SampleError(BAD_JSON, "messages is not a list of {role, content}")
    for message in messages:
        if not is_message(message):
            raise SampleError(BAD_JSON, "messages is not a list of {role, content}")
    return Record(
        messages=messages,
        kind=str(content["kind"]) if content.get("kind") is not None else None,
        source_id=str(content.get("source_id", "")),
        sizes=sizes,
        facts=content["facts"] if isinstance(content.get("facts"), dict) else {},
    )


def is_message(value: Any) -> bool:
    """{"role", "content"}, with a role that is known."""
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


class ShardFolder(NumberedFolder):
    """All shards of one source as a sequence of records. Threads may share it."""

    def __init__(self, path: str | Path, key: str = "data.sources", *, cache: Cache | None = None) -> None:
        """key: the configuration's name for this folder, for messages.

        Raises UserError if the folder holds no shards, or prepare has not finished there.
        """
        cache = cache or Cache(StoreConfig())
        store = cache.open(str(path))
        where = store.url
        manifest = read_manifest(store, key) or {"shards": [], "bytes": 0}
        shards = [shard for shard in manifest["shards"] if shard["records"]]
        if not shards:
            raise UserError(f"{key}={where} holds no shards; run `vlm-nemo prepare` or correct the path")
        counts = [int(shard["records"]) for shard in shards]
        excluded = _read_excluded(store, manifest["excluded"], sum(counts)) if "excluded" in manifest else None
        super().__init__(where, counts, excluded, remote=store.remote)
        self.identity = digest(
            [(shard["name"], shard["records"], shard["sha256"]) for shard in shards],
            manifest["excluded"]["sha256"] if excluded is not None else None,
        )
        self.manifest = manifest
        self.shards = [str(shard["name"]) for shard in shards]
        self.store = store
        self.source: Store = store.direct if isinstance(store, CachedStore) else store
        """The same, past the cache."""
        self._counts = counts
        self._sha256 = {shard["name"]: (str(shard["sha256"]), str(shard["index_sha256"])) for shard in shards}
        self._tars: Store = store
        if isinstance(store, CachedStore) and not cache.admit(int(manifest["bytes"])):
            self._tars = self.source

    def shard(self, number: int) -> str:
        """The name of the shard that a record lies in."""
        return self.shards[self._place(number)[0]]

    def text_tokens(self, fingerprint: str) -> np.ndarray | None:
        """[len] int32: tokens of each record's text (see lengths.py); None if a shard was not measured for it.

        Raises UserError if what lies there belongs to other shards.
        """
        with self._over_shards() as threads:
            parts = []
            for part in threads.map(lambda shard: self._lengths(shard, fingerprint), range(len(self.shards))):
                if part is None:
                    threads.shutdown(wait=False, cancel_futures=True)
                    return None
                parts.append(part)
        tokens = np.concatenate(parts)
        return tokens if self._excluded is None else np.delete(tokens, self._excluded)

    def _lengths(self, shard: int, fingerprint: str) -> np.ndarray | None:
        name = f"{self.shards[shard]}{LENGTHS_INFIX}{fingerprint}.safetensors"
        where = f"{self.path}/{name}"
        try:
            tokens = load(self.store.read_all(name))["text_tokens"]
        except MissingFile:
            return None
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{where} cannot be read ({error}); {_AGAIN}") from None
        if tokens.shape != (self._counts[shard],) or tokens.dtype != np.int32:
            raise UserError(
                f"{where} is {tokens.dtype} {tokens.shape}, the shard has {self._counts[shard]} records; {_AGAIN}"
            )
        return tokens

    def _open(self, shard: int) -> ShardReader:
        name = self.shards[shard]
        try:
            tar = self._tars.open(name, self._sha256[name][0])
            reader = ShardReader(tar, self._index(shard))
        except MissingFile as error:
            raise UserError(f"shard {self.path}/{name} cannot be read ({error}); {_AGAIN}") from None
        if len(reader) != self._counts[shard]:
            raise UserError(
                f"shard {tar.where} holds {len(reader)} records, {MANIFEST} says {self._counts[shard]}; {_AGAIN}"
            )
        return reader

    def _index(self, shard: int) -> bytes:
        name = self.shards[shard]
        sha256 = self._sha256[name][1]
        data = self.store.read_all(name + INDEX_SUFFIX, sha256)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"the index of shard {self.path}/{name} is not the one that {MANIFEST} names; {_AGAIN}")
        return data

    def _sizes(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        where = f"{self.path}/{self.shards[shard]}"
        columns = read_index(self._index(shard), where)
        start = columns["image_start"]
        if len(start) != self._counts[shard] + 1:
            raise UserError(
                f"shard {where} holds {len(start) - 1} records, {MANIFEST} says {self._counts[shard]}; {_AGAIN}"
            )
        return start, np.stack([columns["image_width"], columns["image_height"]], 1)


def read_manifest(store: Store, key: str) -> dict[str, Any] | None:
    """The manifest of a prepared folder, of this version and complete; None if there is none. Raises UserError."""
    where = store.locate(MANIFEST) if not store.remote else f"{store.url}/{MANIFEST}"
    direct = store.direct if isinstance(store, CachedStore) else store  # it may change under its name
    try:
        manifest = json.loads(direct.read_all(MANIFEST))
        names = [str(shard["name"]) for shard in manifest["shards"]]
        complete, version = bool(manifest["complete"]), str(manifest["format"])
        _ = [(int(shard["records"]), shard["sha256"], shard["index_sha256"]) for shard in manifest["shards"]]
        _ = int(manifest["bytes"])
    except MissingFile:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error!r}); {_AGAIN}") from None
    if version != FORMAT:
        raise UserError(f"{key}={store.url} was prepared by another version ({version}, not {FORMAT}); {_AGAIN}")
    if bad := next((name for name in names if Path(name).name != name or not name.endswith(".tar")), None):
        raise UserError(f"{where} names the shard {bad!r}, which is not a file of that folder")
    if not complete:
        raise UserError(f"{key}={store.url} is half prepared; {_AGAIN}, it goes on from there")
    return manifest


def _read_excluded(store: Store, entry: Any, total: int) -> np.ndarray:
    """Sorted numbers of the records to pass over; `entry` is the manifest's word on them."""
    where = f"{store.url}/{EXCLUDED}"
    try:
        sha256 = str(entry["sha256"])
        data = store.read_all(EXCLUDED, sha256)
        records = load(data)["records"]
    except (MissingFile, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({error}); {_AGAIN}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{where} is not the file that {MANIFEST} names; {_AGAIN}")
    if len(records) and not (0 <= records[0] and records[-1] < total and (np.diff(records) > 0).all()):
        raise UserError(f"{where} does not hold sorted numbers of {total} records; {_AGAIN}")
    if len(records) == total:
        raise UserError(f"{where} excludes every record; {_AGAIN}")
    return records
