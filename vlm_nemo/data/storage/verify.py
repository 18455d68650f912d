"""Compare a prepared folder with its manifest, byte by byte and member by member."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from vlm_nemo.data.storage.shards import INDEX_SUFFIX, MANIFEST, ShardFolder, read_index
from vlm_nemo.data.storage.store import File
from vlm_nemo.data.tars import ReadAhead, members
from vlm_nemo.types import UserError

_CHUNK = 1 << 20


def verify(folder: ShardFolder, done: Callable[[str], None] = lambda name: None) -> Iterator[tuple[str, str]]:
    """(shard, what is wrong with it) for every shard that is not what prepare wrote; done: called after each shard.

    Reads every byte, past the cache. A tar's members are counted apart from its SHA-256, so that what is wrong has a
    name: a damaged header, a cut between two members, records that the index does not have.
    """
    for entry in folder.manifest["shards"]:
        name = str(entry["name"])
        try:
            _check(folder, entry)
        except UserError as error:
            yield name, str(error)
        except KeyError as error:
            yield name, f"the index of {folder.path}/{name} has no column {error}"
        done(name)


def _check(folder: ShardFolder, entry: dict[str, str | int]) -> None:
    name = str(entry["name"])
    index = folder.source.read_all(name + INDEX_SUFFIX)
    columns = read_index(index, name)
    tar = folder.source.open(name)
    records, images = len(columns["record_offset"]), len(columns["image_offset"])
    found = sum(1 for _ in members(ReadAhead(tar)))
    if found != records + images:
        raise UserError(f"{tar.where} holds {found} members, its index {records} records and {images} images")
    if records != entry["records"]:
        raise UserError(f"the index of {tar.where} has {records} records, {MANIFEST} says {entry['records']}")
    if int(columns["tar_size"][0]) != tar.size:
        raise UserError(f"{tar.where} has {tar.size} bytes, its index was made for {columns['tar_size'][0]}")
    for what, actual, expected in (
        ("", _sha256(tar), entry["sha256"]),
        ("the index of ", hashlib.sha256(index).hexdigest(), entry["index_sha256"]),
    ):
        if actual != expected:
            raise UserError(f"{what}{tar.where} has the SHA-256 {actual[:12]}…, {MANIFEST} says {str(expected)[:12]}…")


def _sha256(file: File) -> str:
    digest = hashlib.sha256()
    for start in range(0, file.size, _CHUNK):
        digest.update(file.read(start, min(_CHUNK, file.size - start)))
    return digest.hexdigest()
