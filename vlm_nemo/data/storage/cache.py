"""Keep what was fetched from remote stores on a local disk, up to a size.

    CACHE_DIR/blocks/3f/3f…a0-12    block 12 of a file: length and checksum, then the bytes
    CACHE_DIR/indexes/…             indexes of tars that came without one (plain.py); they are small and stay

A block's name holds a hash of where its file lies (without password and signature), its length, and its version
(ETag, time of change, SHA-256 in a manifest): of a file that changed, nothing old is used. Any number of threads and
processes may share a folder. Blocks appear whole or not at all; one that was damaged on disk is fetched again. Where
the disk is full or the folder cannot be written, data is read without the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.storage.store import File, Store, open_store, url_key
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes. A request for so much takes little longer than one for a single image, and images beside it come along."""
TOUCH_SECONDS = 60.0
"""A block that is used again says so this often at most."""
STALE_SECONDS = 3600.0
"""A half-written block of that age has been left by a process that is gone."""
_HEAD = struct.Struct("<8sQ16s")
_MAGIC = b"vlmblk1\n"


class Cache:
    """Blocks of remote files. Threads and processes may share its folder."""

    def __init__(self, cfg: StoreConfig, stop: threading.Event | None = None) -> None:
        """stop: ends what is read from remote stores. Raises UserError if the limit is below zero."""
        if cfg.cache_gb < 0:
            raise UserError(f"data.store.cache_gb={cfg.cache_gb} must be at least 0")
        self.cfg = cfg
        self._stop = stop
        self.folder = Path(cfg.cache_dir).expanduser()
        self.limit = int(cfg.cache_gb * 1e9)
        self._admitted = 0
        self._used: int | None = None
        self._unseen = 0
        self._touched: dict[str, float] = {}
        self._locks = [threading.Lock() for _ in range(64)]
        self._room_lock = threading.Lock()
        self._broken = False

    def open(self, url: str) -> Store:
        """The folder at `url`; a remote one through this cache. Raises UserError."""
        store = open_store(url, self.cfg, self._stop)
        return CachedStore(store, self) if store.remote and self.limit else store

    def admit(self, size: int) -> bool:
        """Whether a source of so many bytes still fits beside those that asked before.

        One that does not is read by exact ranges: its blocks would be gone before they are used again.
        """
        if self._admitted + size > self.limit:
            return False
        self._admitted += size
        return True

    def index(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What `make` gives, kept under a name that says all it depends on; made once if several processes need it."""
        path = self.folder / "indexes" / name
        data = _read_kept(path)
        if data is not None or self._broken:
            return data if data is not None else make()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = open(path.with_name(f"{name}.lock"), "w")
        except OSError as error:
            self._give_up(error)
            return make()
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = _read_kept(path)
            if data is None:
                data = make()
                self._write(path, data)
        path.with_name(f"{name}.lock").unlink(missing_ok=True)
        return data

    def block(self, file: File, key: str, number: int, start: int, end: int) -> bytes:
        """Bytes start to end of a block of a file; fetches it if it is not here."""
        name = f"{key}-{number}"
        path = self.folder / "blocks" / key[:2] / name
        length = min(BLOCK, file.size - number * BLOCK)
        with self._locks[hash(name) % len(self._locks)]:  # threads that need the same block fetch it once
            data = self._load(path, name, length, start, end)
            if data is None:
                whole = file.read(number * BLOCK, length)
                self._keep(path, name, whole)
                data = whole[start:end]
        return data

    def _load(self, path: Path, name: str, length: int, start: int, end: int) -> bytes | None:
        """Part of a block that lies here; None if it does not, or is damaged."""
        touched = self._touched.get(name)
        try:
            with open(path, "rb", buffering=0) as stream:
                if touched is None:  # looked at as a whole once, then trusted
                    whole = _read_kept(path)
                    if whole is None or len(whole) != length:
                        return None
                    data = whole[start:end]
                else:
                    data = os.pread(stream.fileno(), end - start, _HEAD.size + start)
                    if len(data) != end - start:
                        return None
                now = time.monotonic()
                if touched is None or now - touched > TOUCH_SECONDS:
                    os.utime(stream.fileno())
                    self._touched[name] = now
                return data
        except OSError:
            self._touched.pop(name, None)
            return None

    def _keep(self, path: Path, name: str, data: bytes) -> None:
        self._touched.pop(name, None)
        if self._broken:
            return
        try:
            self._make_room(_HEAD.size + len(data))
        except OSError as error:
            self._give_up(error)
        else:
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        """Atomically, with length and checksum."""
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(part, "wb") as stream:
                stream.write(_head(data))
                stream.write(data)
            part.replace(path)
        except OSError as error:
            self._give_up(error)
            part.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s cannot be written (%s): nothing is kept there", self.folder, error)
        self._broken = True

    def _make_room(self, size: int) -> None:
        """Delete the blocks that were used longest ago until `size` more bytes fit.

        What is here is looked up now and then; in between several processes may together pass the limit by a 64th each.
        """
        with self._room_lock:
            self._unseen += size
            if self._used is None or self._used + size > self.limit or self._unseen > self.limit // 64:
                self._used, self._unseen = self._evict(size), size
            self._used += size

    def _evict(self, size: int) -> int:
        """Returns the bytes that are left."""
        root = self.folder / "blocks"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for folder in os.scandir(root):
                for entry in os.scandir(folder):
                    try:
                        status = entry.stat()
                        if entry.name.endswith(".part") and time.time() - status.st_mtime > STALE_SECONDS:
                            os.unlink(entry)
                            continue
                    except FileNotFoundError:  # another process just renamed it
                        continue
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
            used = sum(length for _, length, _ in found)
            if used + size > self.limit:
                for _, length, path in sorted(found):
                    # A tenth more than needed, or the next block would have to look again
                    if used + size <= 0.9 * self.limit or path.endswith(".part"):
                        continue
                    Path(path).unlink(missing_ok=True)
                    used -= length
            return used


def _head(data: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(data), hashlib.blake2b(data, digest_size=16).digest())


def _read_kept(path: Path) -> bytes | None:
    """What was kept in a file; None if it is not there, or is not what was written."""
    try:
        with open(path, "rb", buffering=0) as stream:
            head, data = stream.read(_HEAD.size), stream.readall()
    except OSError:
        return None
    if head == _head(data):
        return data
    log.warning("%s is damaged; it is made again", path)
    return None


class CachedFile:
    """A remote file, read in blocks that are kept."""

    def __init__(self, file: File, url: str, version: str, cache: Cache) -> None:
        self.where = file.where
        self.size = file.size
        self.version = file.version
        self._file = file
        self._cache = cache
        self._key = hashlib.blake2b(
            repr((url_key(url), file.size, file.version, version, BLOCK)).encode(), digest_size=16
        ).hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError."""
        end = offset + size
        if end > self.size:
            raise UserError(f"{self.where} has {self.size} bytes, not the {end} that its index speaks of")
        parts = []
        while offset < end:
            number, start = divmod(offset, BLOCK)
            stop = min(BLOCK, start + end - offset)
            parts.append(self._cache.block(self._file, self._key, number, start, stop))
            offset += stop - start
        return parts[0] if len(parts) == 1 else b"".join(parts)


class CachedStore:
    """A remote folder whose files are read in blocks that are kept."""

    remote = True

    def __init__(self, store: Store, cache: Cache) -> None:
        self.url = store.url
        self.direct = store
        self._cache = cache

    def open(self, name: str, version: str = "") -> CachedFile:
        """version: what else tells one state of the file from another. Raises MissingFile, UserError."""
        return CachedFile(self.direct.open(name), self.direct.locate(name), version, self._cache)

    def read_all(self, name: str, version: str = "") -> bytes:
        """Raises MissingFile, UserError."""
        file = self.open(name, version)
        return file.read(0, file.size)

    def exists(self, name: str) -> bool:
        return self.direct.exists(name)

    def list(self) -> list[str]:
        return self.direct.list()

    def locate(self, name: str) -> str:
        return self.direct.locate(name)
