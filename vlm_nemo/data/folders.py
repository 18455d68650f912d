"""A source of records, whatever lies there: prepared shards, plain WebDataset tars, energon's folders."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vlm_nemo.data.sample import Record
from vlm_nemo.data.shards import ShardFolder


class Folder(Protocol):
    """A source as a sequence of records. Threads may share it."""

    path: str

    def __len__(self) -> int: ...

    def record(self, number: int) -> Record:
        """A record without its images' bytes. Raises SampleError if it cannot be used."""
        ...

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        ...

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """Width and height of a record's images, pixels; nothing is read."""
        ...

    def key(self, number: int) -> str:
        """Shard and member, as in "00012.tar/000120034"."""
        ...

    def text_tokens(self, fingerprint: str) -> np.ndarray | None:
        """[len] int32: tokens of each record's text for that tokenizer and template; None where not prepared."""
        ...


def open_folder(path: str, key: str = "data.sources") -> Folder:
    """The source at `path`; key is the configuration's name for it, for messages. Raises UserError."""
    return ShardFolder(path, key)
