"""A real HTTP server for a folder: range requests, and the faults that a store has on a bad day, by seed."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

FAULTS = ("status 500", "status 429", "short", "drop", "cut", "stall")
STALLS_SELDOM = (*FAULTS[:-1] * 4, FAULTS[-1])
"""A stall costs a test the whole time limit."""
STALL_SECONDS = 3.0


class FolderServer(ThreadingHTTPServer):
    """Serves `folder`; `faulty` is the share of requests that go wrong, each in one of `faults`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faulty = 0.0
        self.faults: tuple[str, ...] = FAULTS
        self.ranges = True
        self.etags = True
        self.escape = False
        self.redirect: str | None = None
        self.random = random.Random(0)
        self.requests: list[tuple[str, str, str | None]] = []
        self.made: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range")
        with server.lock:
            server.requests.append((self.command, name, asked))
            fault = server.random.choice(server.faults) if server.random.random() < server.faulty else ""
            server.made[fault] += 1
        if server.redirect is not None:
            return self._empty(302, {"Location": server.redirect})
        path = server.folder / name
        if fault.startswith("status"):
            return self._empty(int(fault.split()[1]), {})
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if path.is_dir():
            entries = {entry: quote(entry) if server.escape else entry for entry in sorted(os.listdir(path))}
            links = "".join(f'<a href="{link}">{entry}</a>\n' for entry, link in entries.items())
            links += '<a href="http://elsewhere.example/99999.tar">x</a>\n'
            data, status, headers = links.encode(), 200, {"Content-Type": "text/html"}
        elif not path.is_file():
            return self._empty(404, {})
        else:
            data, status, headers = path.read_bytes(), 200, {}
            stamp = path.stat().st_mtime_ns
            if server.etags:
                headers["ETag"] = f'"{stamp}-{len(data)}"'
            if asked and server.ranges:
                first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
        # Fewer bytes, and the header agrees with it; for a whole file that would be a lie about its length
        if fault == "short" and status == 206 and len(data) > 1:
            data = data[: server.random.randrange(1, len(data))]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            if fault == "stall":
                self.wfile.write(data[: len(data) // 2])
                time.sleep(STALL_SECONDS)
                self.close_connection = True
            elif fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(data)
        return None

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve_folder(folder: Path) -> Iterator[FolderServer]:
    """Serves in a thread until the block ends."""
    with FolderServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
