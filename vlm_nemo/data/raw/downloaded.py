"""Images that img2dataset downloaded, found by their address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from vlm_nemo.data.raw.img2dataset import image_of, list_shards, parquet_of, scan_shard, urls_of
from vlm_nemo.data.raw.tar import read_members
from vlm_nemo.data.sample import MISSING_IMAGE, SampleError


class Location(NamedTuple):
    """Where an image lies."""

    shard: str
    """A tar, or the file itself."""
    offset: int
    size: int
    """Bytes"""


def find_downloads(folder: Path) -> dict[str, Location]:
    """{address: where its image lies} of img2dataset's output, tars or files; about 300 bytes of memory an image.

    Addresses are in the parquet beside each shard, else in the json of each sample. Raises UserError.
    """
    found: dict[str, Location] = {}
    for shard in list_shards(folder):
        groups = scan_shard(shard)
        urls = urls_of(parquet_of(shard))
        if not urls:
            said = ((key, _url(contents)) for key, contents in read_members(shard, groups, ("json",)))
            urls = {key.rpartition("/")[2]: url for key, url in said if url}
        for key, members in groups:
            extension, url = image_of(members), urls.get(key.rpartition("/")[2])
            if extension is None or not url:
                continue
            offset, size = members[extension]
            where = shard / f"{key}.{extension}" if shard.is_dir() else shard
            found.setdefault(url, Location(str(where), offset, size))
    return found


def read_download(location: Location) -> bytes:
    """The bytes of an image. Raises SampleError ("missing image") if they are gone."""
    try:
        with open(location.shard, "rb") as stream:
            stream.seek(location.offset)
            data = stream.read(location.size)
    except OSError as error:
        raise SampleError(MISSING_IMAGE, f"{location.shard}: {error.strerror}") from None
    if len(data) != location.size:
        raise SampleError(MISSING_IMAGE, f"{location.shard} became shorter while it was read")
    return data


def _url(contents: dict[str, bytes]) -> str | None:
    try:
        return str(json.loads(contents.get("json", b"{}")).get("url") or "") or None
    except (ValueError, AttributeError, RecursionError):
        return None
