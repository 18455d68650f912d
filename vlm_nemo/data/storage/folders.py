"""A source of records, whatever lies there: prepared shards, plain WebDataset tars, energon's folders."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.raw.energon import META, expand_braces, read_energon
from vlm_nemo.data.sample import Record
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.layouts import Energon, WebDataset
from vlm_nemo.data.storage.plain import PlainFolder
from vlm_nemo.data.storage.shards import INDEX_SUFFIX, MANIFEST, ShardFolder
from vlm_nemo.data.storage.store import MissingFile, Store
from vlm_nemo.types import UserError


class Folder(Protocol):
    """A source as a sequence of records. Threads may share it."""

    path: str
    identity: str
    """A digest of what the records are, wherever they lie: of prepared shards their SHA-256, of tars their names, sizes
    and numbers of samples; and which records are left out."""

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


def open_folder(path: str, key: str = "data.sources", *, cache: Cache | None = None) -> Folder:
    """The source at `path`: a local path or a URL of http, https, s3, gs.

    path: a folder of prepared shards (manifest.json), of energon's (.nv-meta), or of tars; or tars with braces, as in
        http://host/{00000..00041}.tar, where the store cannot list.
    key: the configuration's name for it, for messages. cache: for remote data, and for indexes that have to be made.
    Raises UserError.
    """
    cache = cache or Cache(StoreConfig())
    if path.endswith(".tar"):
        root, names = _split(path)
        return PlainFolder(cache.open(root), names, WebDataset(), cache)
    store = cache.open(path)
    if store.exists(MANIFEST):
        return ShardFolder(path, key, cache=cache)
    if store.exists(f"{META}/dataset.yaml"):
        meta = read_energon(store.url, read=lambda name: _read(store, name))
        return PlainFolder(store, list(meta.tars), Energon(meta), cache, excluded=meta.excluded, counts=meta.counts)
    names = store.list()
    if any(name.endswith(INDEX_SUFFIX) for name in names):
        raise UserError(f"{key}={store.url} is half prepared; run `vlm-nemo prepare` again, it goes on from there")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{key}={store.url} holds no shards; run `vlm-nemo prepare` or correct the path")
    return PlainFolder(store, tars, WebDataset(), cache)


def _split(path: str) -> tuple[str, list[str]]:
    """ "a/b{0..1}.tar" -> "a", ["b0.tar", "b1.tar"]"""
    root, _, pattern = path[: path.find("{") if "{" in path else None].rpartition("/")
    names = expand_braces(path[len(root) + bool(root or path.startswith("/")) :])
    return root or ("/" if path.startswith("/") else "."), names


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read_all(name)
    except MissingFile as error:
        raise FileNotFoundError(str(error)) from None
