"""Write a shard: a tar by the webdataset library, and beside it the index by which its records are read."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlm_nemo.data.sample import ShardSample
from vlm_nemo.data.storage.shards import FORMAT, HASH_BYTES, INDEX_SUFFIX, LENGTHS_INFIX, index_path

_COLUMNS = (
    "record_offset",
    "record_size",
    "image_start",
    "image_offset",
    "image_size",
    "image_width",
    "image_height",
)


def write_shard(tar: Path, samples: Iterable[ShardSample]) -> int:
    """Write a tar and its index, atomically (the index last); returns the number of records.

    Lengths that lie beside an earlier shard of that name go: they belong to other texts.
    """
    import webdataset  # late: it imports torch

    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    columns["image_start"].append(0)
    hashes: list[bytes] = []
    part = tar.with_name(tar.name + ".part")
    # A whole number: a fraction would cost every member two more blocks that say just that
    with open(part, "wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        for sample in samples:
            members = _members(sample)
            where = _places(writer.tarstream.offset, members)
            writer.write({"__key__": sample.key, **members})
            assert where.pop("") == writer.tarstream.offset, f"{tar}: {sample.key} does not lie where it should"
            columns["record_offset"].append(where["json"])
            columns["record_size"].append(len(members["json"]))
            for i, image in enumerate(sample.images):
                columns["image_offset"].append(where[f"{i}.{image.extension}"])
                columns["image_size"].append(len(image.data))
                columns["image_width"].append(image.width)
                columns["image_height"].append(image.height)
                hashes.append(image_hash(image.data))
            columns["image_start"].append(len(hashes))
    index: dict[str, np.ndarray] = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    index["image_hash"] = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
    index_part = tar.with_name(tar.name + INDEX_SUFFIX + ".part")
    # One entry: the order in which safetensors writes several changes from run to run
    save_file(index, index_part, metadata={FORMAT: str(part.stat().st_size)})
    index_path(tar).unlink(missing_ok=True)
    for lengths in tar.parent.glob(f"{tar.name}{LENGTHS_INFIX}*"):
        lengths.unlink()
    part.rename(tar)
    index_part.rename(index_path(tar))
    return len(columns["record_offset"])


def image_hash(data: bytes) -> bytes:
    """What two images have in common if and only if their encoded bytes are the same."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def _members(sample: ShardSample) -> dict[str, bytes]:
    """{extension: contents} of a sample."""
    content: dict[str, Any] = {"messages": sample.messages, "source_id": sample.source_id}
    if sample.kind is not None:
        content["kind"] = sample.kind
    if sample.facts:
        content["facts"] = dict(sample.facts)
    members = {"json": json.dumps(content, ensure_ascii=False).encode()}
    return members | {f"{i}.{image.extension}": image.data for i, image in enumerate(sample.images)}


def _places(offset: int, members: Mapping[str, bytes]) -> dict[str, int]:
    """Where the contents of each member will lie when they are written at `offset`, and under "" where they end.

    The library writes them in the order of their names, each after a header of one block, filled up to whole blocks.
    """
    places = {}
    for name in sorted(members):
        offset += tarfile.BLOCKSIZE
        places[name] = offset
        offset += -(-len(members[name]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return places | {"": offset}
