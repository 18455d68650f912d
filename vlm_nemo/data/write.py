"""Write a shard: a tar by the webdataset library, and beside it the index by which its records are read."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from vlm_nemo.data.sample import Message
from vlm_nemo.data.shards import FORMAT, HASH_BYTES, INDEX_SUFFIX, LENGTHS_INFIX, index_path


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


def write_shard(tar: Path, samples: Iterable[ShardSample]) -> int:
    """Write a tar and its index, atomically (the index last); returns the number of records.

    Lengths that lie beside an earlier shard of that name go: they belong to other texts.
    """
    import webdataset  # late: it imports torch

    keys: list[str] = []
    sizes: list[list[tuple[int, int]]] = []
    hashes: list[bytes] = []
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
            hashes += [image_hash(image.data) for image in sample.images]
    index = _scan(part, keys, sizes)
    index["image_hash"] = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
    index_part = tar.with_name(tar.name + INDEX_SUFFIX + ".part")
    # One entry: the order in which safetensors writes several changes from run to run
    save_file(index, index_part, metadata={FORMAT: str(part.stat().st_size)})
    index_path(tar).unlink(missing_ok=True)
    for lengths in tar.parent.glob(f"{tar.name}{LENGTHS_INFIX}*"):
        lengths.unlink()
    part.rename(tar)
    index_part.rename(index_path(tar))
    return len(keys)


def image_hash(data: bytes) -> bytes:
    """What two images have in common if and only if their encoded bytes are the same."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


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
