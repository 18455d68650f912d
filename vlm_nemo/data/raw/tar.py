"""Samples of a local tar: where their members lie, and their bytes."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from vlm_nemo.data.raw.unit import stamp
from vlm_nemo.data.tars import samples
from vlm_nemo.types import UserError

Group = tuple[str, dict[str, tuple[int, int]]]
"""A sample: its key, and {extension: (offset, size)} of its members."""


def scan_tar(tar: Path) -> list[Group]:
    """(key, {extension: (offset, size)}) of each sample. Raises UserError if the tar ends early or is damaged."""
    return _scan_tar(tar, stamp(tar))


@lru_cache(maxsize=2)
def _scan_tar(tar: Path, stamp: tuple[int, int]) -> list[Group]:
    """Units of one tar come one after the other: it is scanned once for all of them."""
    del stamp
    try:
        with open(tar, "rb") as stream:
            return [
                (key, {member.extension: (member.offset, member.size) for member in group})
                for key, group in samples(_Stream(tar, stream))
            ]
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror}; fetch it again or move it away") from None


class _Stream:
    """An open tar, by range."""

    def __init__(self, tar: Path, stream: BinaryIO) -> None:
        self.where = str(tar)
        self.size = os.fstat(stream.fileno()).st_size
        self._stream = stream

    def read(self, offset: int, size: int) -> bytes:
        self._stream.seek(offset)
        data = self._stream.read(size)
        if len(data) != size:
            raise UserError(f"{self.where} became shorter while it was read; fetch it again")
        return data


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
