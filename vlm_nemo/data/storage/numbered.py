"""Records of many shards under one row of numbers: which shard a number belongs to, and the readers at hand."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Protocol

import numpy as np

from vlm_nemo.data.sample import Record

KEPT_RECORDS = 1 << 23
"""Records of a source whose places are kept in memory, 54 bytes each: 450 MB at most in each process that reads.

Beyond that the index of a shard that was let go is read again: in a random order, with 1000 records a shard, a record
then takes 160 us of CPU time instead of 15. The sizes of all images stay, 16 bytes a record of one image.
"""
_THREADS = 16
"""For reading many small files of a remote source."""


def digest(*parts: object) -> str:
    """12 hex digits for plain data."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


class Reader(Protocol):
    """One shard, read by record number."""

    def __len__(self) -> int: ...
    def record(self, number: int) -> Record: ...
    def images(self, number: int) -> list[bytes]: ...
    def key(self, number: int) -> str: ...


class NumberedFolder(ABC):
    """The shards of one source as a sequence of records. Threads may share it."""

    identity: str
    """See folders.py."""

    def __init__(self, path: str, counts: list[int], excluded: np.ndarray | None = None, *, remote: bool) -> None:
        """counts: records of each shard; excluded: sorted numbers of records that are passed over."""
        self.path = path
        self._ends = list(accumulate(counts))
        self._excluded = excluded
        # Records that remain before each one that is excluded: one bisection finds the n-th that remains
        self._gaps = [] if excluded is None else (excluded - np.arange(len(excluded))).tolist()
        self._len = self._ends[-1] - len(self._gaps)
        self._remote = remote
        self._crowded = self._ends[-1] > KEPT_RECORDS
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()
        self._all_sizes: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._len

    def record(self, number: int) -> Record:
        """A record without its images' bytes. Raises SampleError."""
        reader, local = self._find(number)
        return reader.record(local)

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        reader, local = self._find(number)
        return reader.images(local)

    def key(self, number: int) -> str:
        """Shard and member, as in "00012.tar/000120034"."""
        reader, local = self._find(number)
        return reader.key(local)

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """Width and height of a record's images, pixels. The first call reads every shard's index."""
        shard, local = self._place(number)
        start, size = self._all_sizes or self._load_sizes()
        first = local + (self._ends[shard - 1] if shard else 0)
        return [(width, height) for width, height in size[start[first] : start[first + 1]].tolist()]

    @abstractmethod
    def _open(self, shard: int) -> Reader:
        """A shard to read from. Raises UserError if it is not what it should be."""

    @abstractmethod
    def _sizes(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """[records + 1] where the images of each record start, [images, 2] their width and height."""

    def _over_shards(self) -> ThreadPoolExecutor:
        """Threads that hide a remote store's latency."""
        return ThreadPoolExecutor(_THREADS if self._remote else 1, thread_name_prefix="vlm_nemo.index")

    def _load_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        with self._over_shards() as threads:
            parts = list(threads.map(self._sizes, range(len(self._ends))))
        images = [len(size) for _, size in parts]
        starts = [start[:-1] + before for (start, _), before in zip(parts, accumulate([0, *images]), strict=False)]
        found = (
            np.concatenate([*starts, [sum(images)]]).astype(np.int64),
            np.concatenate([size for _, size in parts]).astype(np.int32),
        )
        self._all_sizes = found
        return found

    def _place(self, number: int) -> tuple[int, int]:
        """Shard, and number in it."""
        if not 0 <= number < self._len:
            raise IndexError(f"record {number} of {self._len}")
        if self._gaps:
            number += bisect_right(self._gaps, number)
        shard = bisect_right(self._ends, number)
        return shard, number - self._ends[shard - 1] if shard else number

    def _find(self, number: int) -> tuple[Reader, int]:
        shard, local = self._place(number)
        reader = self._readers.get(shard)
        if reader is not None:
            if self._crowded:
                with self._lock:
                    if shard in self._readers:
                        self._readers.move_to_end(shard)
            return reader, local
        reader = self._open(shard)  # not under the lock: it may have to wait for a store
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = reader
                self._kept += len(reader)
                # The one used longest ago is only let go; a thread that still reads from it has it in hand
                while self._kept > KEPT_RECORDS and len(self._readers) > 1:
                    self._kept -= len(self._readers.popitem(last=False)[1])
        return reader, local
