"""Files of HTTP servers and object stores, by range, through fsspec.

What fails there for a while (status 5xx, 408, 429, a stall, a short read, a dropped connection) is tried again; what
fails for good is one error that says where. Redirects are followed within http and https, as data hubs need them, but
never from https down to http.
"""

from __future__ import annotations

import asyncio
import html
import logging
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.storage.store import MissingFile, show_url
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""
LOOK = 0.25
"""Seconds between two looks at whether the reader was told to stop."""
PIECE = 1 << 20
"""Bytes of one request when a whole file is read: what takes too long should be known soon."""
LONGEST_PAGE = 1 << 26
"""Bytes that are read of a folder's page."""
_LINK = re.compile(r"""<a\s(?:[^>]*\s)?href\s*=\s*(["'])(.*?)\1""", re.IGNORECASE | re.DOTALL)
_NO_RETRY = (TypeError, ValueError, ImportError, PermissionError, IsADirectoryError, NotImplementedError)
_T = TypeVar("_T")


class Passing(Exception):
    """An answer that may be better next time."""


class Stopped(Exception):
    """Whoever reads does not want it any more."""


class RemoteFile:
    """A file of a RemoteStore."""

    def __init__(self, store: RemoteStore, name: str, info: dict[str, Any]) -> None:
        self.where = show_url(store.locate(name))
        self.size = int(info["size"])
        self.version = "|".join(
            str(info[key]) for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "created")
            if info.get(key)
        )  # fmt: skip
        self._expected = {"size": self.size, "ETag": info.get("ETag"), "Last-Modified": info.get("Last-Modified")}
        self._store = store
        self._name = name

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises UserError when the store does not give them after all tries."""
        if not size:
            return b""

        def fetch() -> bytes:
            data = self._store.fetch(self._name, offset, offset + size, self._expected)
            if len(data) != size:
                raise Passing(f"{len(data)} bytes instead of {size}")
            return data

        return self._store.insist(self._name, fetch)


class RemoteStore:
    """A folder behind a URL, through fsspec."""

    remote = True

    def __init__(self, url: str, cfg: StoreConfig, stop: threading.Event | None = None) -> None:
        """stop: once it is set, every read, also one under way, ends with Stopped within LOOK.

        Raises UserError where the scheme's library is not installed, or cfg asks for no try at all."""
        if cfg.tries < 1 or cfg.timeout <= 0 or cfg.wait < 0:
            raise UserError(
                f"data.store: tries={cfg.tries} must be at least 1, timeout={cfg.timeout} above 0, "
                f"wait={cfg.wait} not below 0"
            )
        self.url = show_url(url)
        self._parts = urlsplit(url)
        self._cfg = cfg
        self._stop = stop or threading.Event()
        self._http = self._parts.scheme in ("http", "https")
        self._fs: tuple[int, Any] | None = None
        self._known: dict[str, dict[str, Any]] = {}
        self._jitter = random.Random()
        self._filesystem()

    def locate(self, name: str) -> str:
        """The URL of a file of this folder."""
        if not self._http:
            return urlunsplit(self._parts).rstrip("/") + ("/" + name if name else "")
        path = self._parts.path.rstrip("/") + "/" + quote(name, safe="/")
        return urlunsplit(self._parts._replace(path=path))

    def open(self, name: str, version: str = "") -> RemoteFile:
        """Raises MissingFile, UserError. What the store says about a file is asked once."""
        if name not in self._known:

            def ask() -> dict[str, Any]:
                info = self._call("info", self.locate(name))
                if info.get("size") is None:
                    raise UserError(f"{show_url(self.locate(name))}: the server does not say how long it is")
                return info

            self._known[name] = self.insist(name, ask)
        return RemoteFile(self, name, self._known[name])

    def read_all(self, name: str, version: str = "") -> bytes:
        """A whole file, in requests of PIECE bytes. Raises MissingFile, UserError."""
        file = self.open(name)
        return b"".join(file.read(start, min(PIECE, file.size - start)) for start in range(0, file.size, PIECE))

    def exists(self, name: str) -> bool:
        try:
            self.open(name)
        except MissingFile:
            return False
        return True

    def list(self) -> list[str]:
        """Names of the files, sorted. Over HTTP: what the folder's page links to."""
        root = self.locate("")
        try:
            if not self._http:
                found = self.insist("", lambda: self._call("ls", root.rstrip("/"), detail=False))
                return sorted({url.rsplit("/", 1)[1] for url in found} - {""})
            page = self.insist("", lambda: self._call("cat_file", root, start=0, end=LONGEST_PAGE))
        except MissingFile:
            return []
        # Not by fsspec: it joins links to the query, and takes "a%20b" for a name
        links = [
            urlsplit(urljoin(root, html.unescape(match[2]))) for match in _LINK.finditer(page.decode(errors="replace"))
        ]
        folder = unquote(self._parts.path).rstrip("/") + "/"
        paths = [unquote(link.path) for link in links if _host(link) == _host(self._parts)]  # it may link to anywhere
        names = {path[len(folder) :] for path in paths if path.startswith(folder)}
        return sorted(name for name in names if name and "/" not in name)

    def fetch(self, name: str, start: int, end: int, expected: dict[str, Any]) -> bytes:
        """One try to read bytes start to end; it may give less."""
        more = {"trace_request_ctx": expected} if self._http else {}
        return self._call("cat_file", self.locate(name), start=start, end=end, **more)

    def insist(self, name: str, call: Callable[[], _T]) -> _T:
        """Call until it works, cfg.tries times at most. Raises MissingFile, UserError, Stopped."""
        where = show_url(self.locate(name))
        wait = self._cfg.wait
        for attempt in range(1, self._cfg.tries + 1):
            if self._stop.is_set():
                raise Stopped(where)
            try:
                return call()
            except (UserError, Stopped):
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
                if isinstance(cause, UserError):
                    raise cause from None
                status = _status(cause)
                if status in (404, 410) or (status is None and isinstance(cause, FileNotFoundError)):
                    raise MissingFile(f"{where} is not there (status {status or 404})") from None
                what = _describe(cause, status, self._cfg.timeout)
                if isinstance(cause, _NO_RETRY) or (status and 400 <= status < 500 and status not in (408, 429)):
                    raise UserError(f"{where} cannot be read: {what}") from None
                if attempt == self._cfg.tries:
                    raise UserError(
                        f"{where} cannot be read: {what}, after {attempt} tries; see to the store, or raise "
                        "data.store.tries or data.store.timeout"
                    ) from None
                # Jitter: many ranks that failed together should not come back together
                pause = max(min(wait, LONGEST_WAIT) * self._jitter.uniform(0.5, 1.0), _retry_after(cause))
                log.warning("%s: %s; try %d of %d in %.1f s", where, what, attempt + 1, self._cfg.tries, pause)
                self._stop.wait(pause)
                wait *= 2
        raise AssertionError("unreachable")

    def _filesystem(self) -> Any:
        """fsspec's file system; a process that was forked gets its own."""
        if self._fs is None or self._fs[0] != os.getpid():
            from fsspec.core import url_to_fs  # late: half a second

            options = {"get_client": _client} if self._http else {}
            try:
                self._fs = (os.getpid(), url_to_fs(urlunsplit(self._parts), **options)[0])
            except ImportError as error:
                raise UserError(f"{self.url} cannot be read: {error}") from None
        return self._fs[1]

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        fs = self._filesystem()
        if not fs.async_impl:
            return getattr(fs, method)(*args, **kwargs)
        # Past the time, or when nobody wants it any more, the request is cancelled: a stalled connection is not kept
        request = asyncio.wait_for(getattr(fs, f"_{method}")(*args, **kwargs), self._cfg.timeout)
        answer = asyncio.run_coroutine_threadsafe(request, fs.loop)
        try:
            while not wait((answer,), LOOK).done:
                if self._stop.is_set():
                    raise Stopped(self.url)
        except BaseException:
            answer.cancel()
            raise
        return answer.result()


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _status(error: BaseException) -> int | None:
    """HTTP status of what aiohttp, s3fs or gcsfs raised; None if it never came to one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def _describe(error: BaseException, status: int | None, timeout: float) -> str:
    if status is not None:
        return f"status {status}"
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    return f"{type(error).__name__} {show_url(str(error))}".strip() if not isinstance(error, Passing) else str(error)


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks for, LONGEST_WAIT at most."""
    value = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(value), LONGEST_WAIT) if str(value).isdigit() else 0.0


async def _client(**kwargs: Any) -> Any:
    """fsspec's HTTP session, with eyes on redirects and on what a request for a range brings."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    trace.on_request_end.append(_check_answer)
    # Encoded answers would have other lengths; trust_env: a cluster's proxy
    return aiohttp.ClientSession(
        trace_configs=[trace], headers={"Accept-Encoding": "identity"}, trust_env=True, **kwargs
    )


async def _check_redirect(session: Any, context: Any, params: Any) -> None:
    target = str(params.response.headers.get("Location", ""))
    if params.url.scheme == "https" and target.lower().startswith("http:"):
        params.response.close()
        raise UserError(f"{show_url(str(params.url))} redirects from https to http, which is not followed")


async def _check_answer(session: Any, context: Any, params: Any) -> None:
    """Raises UserError if the server has no ranges (before a whole tar is loaded), or the file is another by now."""
    asked = params.headers.get("Range")
    expected = context.trace_request_ctx
    answer = params.response
    if not asked or not expected or answer.status >= 300:
        return
    problem = None
    if answer.status != 206 and asked != f"bytes=0-{expected['size'] - 1}":
        problem = "the server does not serve ranges of a file; use one that does"
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    changed = total.isdigit() and int(total) != expected["size"]
    told = [(answer.headers.get(key), expected[key]) for key in ("ETag", "Last-Modified")]
    told = [(new, old) for new, old in told if new and old]
    # Mirrors of one file may name it differently, but they agree on its time
    if changed or (told and all(new != old for new, old in told)):
        problem = "the file changed while it was read; start again"
    if problem:
        answer.close()
        raise UserError(f"{show_url(str(params.url))}: {problem}")
