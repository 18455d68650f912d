"""Bytes by range, from a local folder, over HTTP or out of an object store.

A store is a folder of named files. Here: what every store can do, and local folders; remote.py has the rest.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.types import UserError

SCHEMES = ("http", "https", "s3", "gs", "memory")
"""memory is fsspec's, for tests."""
OPEN_FILES = 256
"""Local files that a process holds open; well below the usual limit of 1024."""


class MissingFile(UserError):
    """There is no such file."""


class File(Protocol):
    """One file, read by range. Threads may share it."""

    where: str
    """Path or URL, without credentials."""
    size: int
    version: str
    """Changes when the file does: its time of change, or what the store gives instead."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError."""
        ...


class Store(Protocol):
    """A folder of files."""

    url: str
    """Path or URL, without credentials."""
    remote: bool

    def open(self, name: str, version: str = "") -> File:
        """version: what else is known to tell one state of the file from another. Raises MissingFile, UserError."""
        ...

    def read_all(self, name: str, version: str = "") -> bytes:
        """A whole file, a small one. Raises MissingFile, UserError."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self) -> list[str]:
        """Names of the files that lie there, sorted. Raises UserError where the store cannot list."""
        ...

    def locate(self, name: str) -> str:
        """Where a file lies; it may hold a password. `url_key` makes a key of it."""
        ...


def open_store(url: str, cfg: StoreConfig, stop: threading.Event | None = None) -> Store:
    """The folder at a local path or a URL of SCHEMES. Raises UserError for any other.

    stop: ends what is read from a remote one.
    """
    if "://" not in url and not url.startswith(("pipe:", "file:")):
        return LocalStore(url)
    scheme = url.split(":", 1)[0]
    if scheme not in SCHEMES or "::" in url:
        raise UserError(
            f"{show_url(url)} cannot be read: data comes from a local path or from one URL of "
            f"{', '.join(s for s in SCHEMES if s != 'memory')}"
        )
    from vlm_nemo.data.storage.remote import RemoteStore  # it builds on this file

    return RemoteStore(url, cfg, stop)


def show_url(url: str) -> str:
    """A URL, or a text with URLs, without what may be secret: user, password, query.

    Rather too little than too much: a password may hold "@", "/" or "?", though it should be escaped there.
    """
    return re.sub(r"[?#][^\s'\")\]]*", "", _USER.sub("://", url))


_USER = re.compile(
    r"://(?:"
    # user:password, not host:port, up to the last @
    r"[^/\s?#:@]*:(?!\d*(?:[/?#\s'\")\]]|$))(?:[^\s?#]*@|\S*@)"
    r"|[^/\s?#]*@)"
)
_SIGNATURE = re.compile(
    r"(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|key-pair-id|policy|signature|expires|token|access_token"
    r"|sv|ss|srt|sp|se|st|spr|sr|si|sip|sig|sdd|skoid|sktid|skt|ske|sks|skv)",
    re.IGNORECASE,
)
"""Parameters of signed URLs (S3, Google's, CloudFront, Azure's)."""


def url_key(url: str) -> str:
    """A URL by what it names, for keys of what is kept: without user, password, and parameters that only sign it.

    Other parameters stay, as they may name the object (download?id=3).
    """
    if "://" not in url:
        return url
    parts = urlsplit(url)
    query = "&".join(part for part in parts.query.split("&") if not _SIGNATURE.fullmatch(part.partition("=")[0]))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment=""))


def redact(value: Any) -> Any:
    """Plain data with `show_url` applied to every URL in it."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return show_url(value) if isinstance(value, str) and "://" in value else value


class _Handle:
    """An open file; closed when nobody has it in hand any more."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalFile:
    """A local file; its handle is lent, so that any number of files can be at hand."""

    def __init__(self, path: Path) -> None:
        """Raises MissingFile, UserError."""
        self.where = str(path)
        self._path = path
        self._handle: _Handle | None = None
        status = os.fstat(self._open().fd)
        self.size = status.st_size
        self.version = str(status.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError."""
        handle = self._handle or self._reopen()
        data = os.pread(handle.fd, size, offset)
        return data if len(data) == size else self._rest(handle, data, offset, size)

    def _rest(self, handle: _Handle, data: bytes, offset: int, size: int) -> bytes:
        """The kernel may give less than was asked for, at least one byte until the file ends."""
        while len(data) < size:
            more = os.pread(handle.fd, size - len(data), offset + len(data))
            if not more:
                raise UserError(f"{self.where} became shorter while it was read; make or fetch it again")
            data += more
        return data

    def _open(self) -> _Handle:
        try:
            handle = _Handle(self._path)
        except (OSError, ValueError) as error:
            raise _cannot_read(self._path, error) from None
        self._handle = handle
        _lend(self)
        return handle

    def _reopen(self) -> _Handle:
        handle = self._open()
        status = os.fstat(handle.fd)
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, self.version):
            raise UserError(f"{self.where} changed while it was read; start again")
        return handle


def _cannot_read(path: Path, error: OSError | ValueError) -> UserError:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    text = error.strerror if isinstance(error, OSError) else error
    return (MissingFile if missing else UserError)(f"{path} cannot be read: {text}")


_lent: deque[weakref.ref[LocalFile]] = deque()
_lent_lock = threading.Lock()


def _lend(file: LocalFile) -> None:
    """The file that was opened longest ago gives its handle up; a thread that still reads from it keeps it open."""
    with _lent_lock:
        _lent.append(weakref.ref(file))
        while len(_lent) > OPEN_FILES:
            oldest = _lent.popleft()()
            if oldest is not None:
                oldest._handle = None


class LocalStore:
    """A folder on this machine."""

    remote = False

    def __init__(self, path: str | Path) -> None:
        self.url = str(path)
        self._folder = Path(path)

    def open(self, name: str, version: str = "") -> LocalFile:
        """Raises MissingFile, UserError."""
        return LocalFile(self._folder / name)

    def read_all(self, name: str, version: str = "") -> bytes:
        """Raises MissingFile, UserError."""
        try:
            return (self._folder / name).read_bytes()
        except (OSError, ValueError) as error:
            raise _cannot_read(self._folder / name, error) from None

    def exists(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def list(self) -> list[str]:
        """Names of the files, sorted; none if there is no such folder."""
        try:
            return sorted(entry.name for entry in os.scandir(self._folder) if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def locate(self, name: str) -> str:
        return os.path.abspath(self._folder / name)
