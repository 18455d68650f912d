"""Look through a tar of samples once, and notice when it is damaged."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from vlm_nemo.data.raw.unit import stamp
from vlm_nemo.types import UserError

Group = tuple[str, dict[str, tuple[int, int]]]
"""A sample: its key, and {extension: (offset, size)} of its members."""
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset's tools keep for themselves."""


def scan_tar(tar: Path) -> list[Group]:
    """(key, {extension: (offset, size)}) of each sample. Raises UserError if the tar ends early or is damaged.

    The usual readers stop without a word at a damaged header or at a cut between two members.
    """
    return _scan_tar(tar, stamp(tar))


@lru_cache(maxsize=2)
def _scan_tar(tar: Path, stamp: tuple[int, int]) -> list[Group]:
    """Units of one tar come one after the other: it is scanned once for all of them."""
    del stamp
    groups: list[Group] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not extension or _NO_SAMPLE.match(member.name):
                    continue
                key = folder + slash + stem
                if not groups or groups[-1][0] != key:
                    groups.append((key, {}))
                groups[-1][1][extension.lower()] = (member.offset_data, member.size)
            end = archive.offset
        with open(tar, "rb") as stream:
            stream.seek(end)  # a whole tar ends with blocks of zeros
            whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar} cannot be read as a tar: {error}; fetch it again or move it away") from None
    if not whole:
        raise UserError(f"{tar} is damaged or cut after {len(groups)} samples; fetch it again or move it away")
    return groups


def count_tar(tar: Path) -> int:
    """Number of samples in a tar."""
    return len(scan_tar(tar))


def read_members(
    tar: Path, groups: Iterable[Group], wanted: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of each sample, only the wanted extensions where they are given.

    tar: may be a folder of files KEY.extension too.
    """
    if tar.is_dir():
        for key, members in groups:
            named = [extension for extension in members if wanted is None or extension.lower() in wanted]
            yield key, {extension.lower(): (tar / f"{key}.{extension}").read_bytes() for extension in named}
        return
    with open(tar, "rb") as stream:
        for key, members in groups:
            contents = {}
            for extension, (offset, size) in members.items():
                if wanted is None or extension in wanted:
                    stream.seek(offset)
                    contents[extension] = stream.read(size)
            yield key, contents
