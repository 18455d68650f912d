"""The members of a tar, from one pass over its headers; a damaged or shortened tar is an error that names it.

The usual readers stop without a word at a damaged header or at a cut between two members.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from vlm_nemo.types import UserError

PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt")
"""Members that a reader might run. They are refused, not passed over: who wrote them expects them to be read."""
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset's tools keep for themselves."""
_CHUNK = 1 << 20


class Tar(Protocol):
    """A tar's bytes by range."""

    where: str
    """Path or URL, without credentials."""
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError."""
        ...


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    """As the tar has it; only ever a name, never a path."""
    offset: int
    size: int

    @property
    def key(self) -> str:
        """What the members of a sample share: the name up to the first dot of its last part."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def extension(self) -> str:
        """The rest, in lower case: "jpg", "0.png"."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def samples(tar: Tar) -> Iterator[tuple[str, list[Member]]]:
    """(key, members) of each sample, as WebDataset groups them: by key, one after the other. Raises UserError.

    Members without an extension, and those of WebDataset's tools, belong to no sample.
    """
    named = (member for member in members(tar) if member.extension and not _NO_SAMPLE.match(member.name))
    for key, group in itertools.groupby(named, lambda member: member.key):
        yield key, list(group)


def members(tar: Tar) -> Iterator[Member]:
    """Files of a tar, in order. Raises UserError, after the last whole one, if the tar is damaged or cut."""
    found = 0
    stream = _Stream(tar)
    advice = "fetch it again or move it away"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
            for info in archive:
                archive.members = []  # tarfile keeps them all
                if not info.isfile():
                    continue
                if info.name.lower().endswith(PICKLES):
                    raise UserError(
                        f"{tar.where} holds {info.name!r}, a pickle, which could run code; such tars are not read"
                    )
                found += 1
                yield Member(info.name, info.offset_data, info.size)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{tar.where} is damaged after {found} members ({error}); {advice}") from None
    if not _zeros(tar, end):
        raise UserError(f"{tar.where} is damaged or cut after {found} members; {advice}")


def _zeros(tar: Tar, start: int) -> bool:
    """Whether a tar's end is as it should be: at least one block, and nothing but zeros."""
    if tar.size - start < tarfile.BLOCKSIZE:
        return False
    for offset in range(start, tar.size, _CHUNK):
        data = tar.read(offset, min(_CHUNK, tar.size - offset))
        if data.count(0) != len(data):
            return False
    return True


class ReadAhead:
    """A remote tar for one pass from its start to its end: a megabyte is asked for at a time."""

    def __init__(self, tar: Tar) -> None:
        self.where, self.size = tar.where, tar.size
        self._tar = tar
        self._start = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError."""
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            start = offset - offset % _CHUNK
            end = min(max(start + _CHUNK, offset + size), self.size)
            self._start, self._data = start, self._tar.read(start, end - start)
        return self._data[offset - self._start : offset - self._start + size]


class _Stream:
    """What tarfile needs of a file that is open for reading."""

    def __init__(self, tar: Tar) -> None:
        self._tar = tar
        self._position = 0
        self.name = tar.where

    def read(self, size: int) -> bytes:
        size = max(0, min(size, self._tar.size - self._position))
        data = self._tar.read(self._position, size)
        self._position += size
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position
