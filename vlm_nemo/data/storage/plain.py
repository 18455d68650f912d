"""Tars that came without an index: one is made on first use and kept, then they are read as prepared shards are.

By position, in exact order, resumable; nothing is converted. The index is made by one pass over the tar's headers and
the headers of its images. Samples that cannot be used have their number too, and raise when they are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Iterable

import numpy as np
from safetensors.numpy import load, save

from vlm_nemo.data.header import read_header
from vlm_nemo.data.sample import REASONS, Record, SampleError
from vlm_nemo.data.storage.cache import Cache, CachedStore
from vlm_nemo.data.storage.layouts import Layout
from vlm_nemo.data.storage.numbered import NumberedFolder, digest
from vlm_nemo.data.storage.store import File, Store, url_key
from vlm_nemo.data.tars import Member, ReadAhead, Tar, samples
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

FORMAT = "vlm_nemo.plain.2"
JPEG_HEADER = 1 << 17
"""Bytes of a JPEG in which its size and EXIF are looked for first."""
PROGRESS_SECONDS = 10.0
_TEXTS = ("key", "name")


def index_tar(tar: Tar, layout: Layout, excluded: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
    """Where each sample's texts and images lie in a tar; excluded: keys of samples that are left out.

    `key`, `name` are texts, one after the other, `…_start` says where each begins. Raises UserError if the tar is
    damaged.
    """
    names: dict[str, int] = {}
    columns: dict[str, list[int]] = {
        "all": [], "key_start": [0], "text_start": [0], "text_name": [], "text_offset": [], "text_size": [],
        "image_start": [0], "image_name": [], "image_offset": [], "image_size": [], "image_width": [],
        "image_height": [], "image_fault": [],
    }  # fmt: skip
    keys = bytearray()
    for key, group in samples(tar):
        by_extension = {member.extension: member for member in group}
        columns["all"].append(0)
        if key in excluded:
            continue
        for what, extensions in (
            ("text", layout.texts(list(by_extension))),
            ("image", layout.images(list(by_extension))),
        ):
            for extension in extensions:
                member = by_extension[extension]
                columns[f"{what}_name"].append(names.setdefault(extension, len(names)))
                columns[f"{what}_offset"].append(member.offset)
                columns[f"{what}_size"].append(member.size)
                if what == "image":
                    width, height, fault = _look(tar, member)
                    columns["image_width"].append(width)
                    columns["image_height"].append(height)
                    columns["image_fault"].append(fault)
            columns[f"{what}_start"].append(len(columns[f"{what}_name"]))
        keys += key.encode("utf-8", "surrogateescape")
        columns["key_start"].append(len(keys))
    columns["all"] = [len(columns["all"])]
    arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    arrays["key"] = np.frombuffer(bytes(keys), dtype=np.uint8)
    arrays["name"] = np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8)
    return arrays


def _look(tar: Tar, member: Member) -> tuple[int, int, int]:
    """Width, height, 0; or 0, 0 and what is wrong: one more than its place in REASONS."""
    data = tar.read(member.offset, min(JPEG_HEADER, member.size))
    if data[:3] == b"\xff\xd8\xff":
        try:
            header = read_header(data)
            return header.width, header.height, 0
        except SampleError:  # its header may be longer
            pass
    if len(data) < member.size:
        data += tar.read(member.offset + len(data), member.size - len(data))
    try:
        header = read_header(data)
    except SampleError as error:
        return 0, 0, 1 + REASONS.index(error.reason)
    return header.width, header.height, 0


class TarReader:
    """One indexed tar, read by record number."""

    def __init__(self, file: File, name: str, columns: dict[str, np.ndarray], layout: Layout) -> None:
        self._read = file.read
        self._name = name
        self._layout = layout
        self._names: list[str] = json.loads(columns["name"].tobytes())
        self._key = columns["key"].tobytes()
        # array, not NumPy's: an element is an int already
        self._columns = {key: array("q", values.tobytes()) for key, values in columns.items() if key not in _TEXTS}

    def __len__(self) -> int:
        return len(self._columns["key_start"]) - 1

    def record(self, number: int) -> Record:
        """A record without its images' bytes. Raises SampleError."""
        at = self._columns
        contents = {self._names[at["text_name"][i]]: self._member("text", i) for i in self._span("text", number)}
        images = self._span("image", number)
        text = self._layout.text(contents, [self._names[at["image_name"][i]] for i in images])
        for i in images:
            if at["image_fault"][i]:
                raise SampleError(REASONS[at["image_fault"][i] - 1], "its header says so")
        return Record(
            messages=text.messages,
            kind=text.kind,
            source_id=text.source_id or self.key(number),
            sizes=[(at["image_width"][i], at["image_height"][i]) for i in images],
        )

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a record, in order."""
        return [self._member("image", i) for i in self._span("image", number)]

    def key(self, number: int) -> str:
        """Tar and sample, as in "00012.tar/000120034"."""
        start, end = self._columns["key_start"][number], self._columns["key_start"][number + 1]
        return f"{self._name}/{self._key[start:end].decode('utf-8', 'replace')}"

    def _span(self, what: str, number: int) -> range:
        start = self._columns[f"{what}_start"]
        return range(start[number], start[number + 1])

    def _member(self, what: str, i: int) -> bytes:
        return self._read(self._columns[f"{what}_offset"][i], self._columns[f"{what}_size"][i])


class PlainFolder(NumberedFolder):
    """Tars of one source as a sequence of records. Threads may share it."""

    def __init__(
        self,
        store: Store,
        names: list[str],
        layout: Layout,
        cache: Cache,
        *,
        excluded: Iterable[str] = (),
        counts: dict[str, int] | None = None,
    ) -> None:
        """names: the tars, in order; excluded: samples to leave out ("shard.tar/key"); counts: samples that each holds.

        Raises UserError if a tar is damaged, or holds another number of samples.
        """
        self.names = names
        self._store = store
        self._tars: Store = store
        self._layout = layout
        self._cache = cache
        self._left_out = frozenset(excluded)
        self._files: dict[int, File] = {}
        self._remote = store.remote
        found = []
        shown = time.monotonic()
        with self._over_shards() as threads:
            for shard, columns in enumerate(threads.map(self._index, range(len(names)))):
                samples = int(columns["all"][0])
                if counts is not None and samples != counts[names[shard]]:
                    raise UserError(
                        f"{store.url}/{names[shard]} holds {samples} samples, {counts[names[shard]]} were counted when "
                        "it was prepared; fetch it again, or run `energon prepare` again"
                    )
                found.append(len(columns["key_start"]) - 1)
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    log.info("index of %s: %d of %d tars, %d records", store.url, shard + 1, len(names), sum(found))
        if not sum(found):
            raise UserError(f"{store.url}: its {len(names)} tars hold no samples; correct the path")
        super().__init__(store.url, found, remote=store.remote)
        # Their times change when they are copied; a SHA-256 would take a pass over every byte
        sizes = [(name, self._file(shard).size) for shard, name in enumerate(names)]
        self.identity = digest(sizes, found, layout.name, sorted(self._left_out))
        if isinstance(store, CachedStore) and not cache.admit(sum(file.size for file in self._files.values())):
            self._files = {}
            self._tars = store.direct

    def text_tokens(self, fingerprint: str) -> np.ndarray | None:
        """None: nothing was measured."""
        return None

    def _open(self, shard: int) -> TarReader:
        return TarReader(self._file(shard), self.names[shard], self._index(shard), self._layout)

    def _sizes(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        columns = self._index(shard)
        return columns["image_start"], np.stack([columns["image_width"], columns["image_height"]], 1)

    def _file(self, shard: int) -> File:
        """The same for good: a tar that changes while it is read is an error, not another tar."""
        file = self._files.get(shard)
        if file is None:
            file = self._files.setdefault(shard, self._tars.open(self.names[shard]))
        return file

    def _index(self, shard: int) -> dict[str, np.ndarray]:
        file = self._file(shard)
        name = self.names[shard]
        excluded = frozenset(entry[len(name) + 1 :] for entry in self._left_out if entry.startswith(f"{name}/"))
        state = (
            FORMAT,
            url_key(self._store.locate(name)),
            file.size,
            file.version,
            self._layout.name,
            sorted(excluded),
        )
        digest = hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()
        source = ReadAhead(file) if self._remote else file
        return load(self._cache.index(digest, lambda: save(index_tar(source, self._layout, excluded))))
