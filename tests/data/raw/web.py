"""A web server on loopback with good pictures and the faults that the web has, and the real img2dataset to fetch them.

img2dataset pins old versions of libraries that this project uses too, so it lives in an environment of its own, made
once and kept in the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = "1.47.0"
SLOW = 5.0
"""Seconds until a slow answer begins."""


class NoDownloader(Exception):
    """img2dataset could not be installed."""


def downloader() -> Path:
    """The Python of an environment with img2dataset. Raises NoDownloader."""
    site = sysconfig.get_paths()["purelib"]
    tag = hashlib.sha256(f"{sys.version}{site}".encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_nemo"
    home = cache / f"img2dataset-{VERSION}-{tag}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(home.with_name(home.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be making it
        if not (home / "ready").is_file():
            shutil.rmtree(home, ignore_errors=True)
            _install(home, site)
            (home / "ready").touch()
    return home / "bin" / "python"


def _install(home: Path, site: str) -> None:
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--retries", "1", "--timeout", "20"]
    _run([sys.executable, "-m", "venv", "--without-pip", str(home)])
    # What fits is taken from here; pip puts other versions into the new environment, which comes first
    packages = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})["purelib"]
    Path(packages, "shared.pth").write_text(f"{site}\n")
    _run([*pip, "install", "-q", "--no-compile", f"img2dataset=={VERSION}"])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.SubprocessError as error:
        said = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise NoDownloader(f"img2dataset {VERSION} cannot be installed: {said[-300:]}") from None


def fetch(python: Path, listed: Path, out: Path, formats: dict[str, str], **options: Any) -> None:
    """Run img2dataset on a parquet of URL, TEXT and more, for each of {folder: output_format}."""
    given = {
        "url_list": str(listed), "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT",
        "thread_count": 8, "processes_count": 1, "timeout": 3, "retries": 0,
        "number_sample_per_shard": 10, "image_size": 64, "resize_mode": "keep_ratio", "resize_only_if_bigger": True,
        "skip_reencode": True, "compute_hash": "sha256", "disallowed_header_directives": [],
    }  # fmt: skip
    runs = [
        given | options | {"output_folder": str(out / name), "output_format": kind} for name, kind in formats.items()
    ]
    code = f"import img2dataset, json\nfor run in json.loads({json.dumps(runs)!r}): img2dataset.download(**run)"
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def web(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files by name; names that begin with "slow" answer late, others are not found. Gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            if name.startswith("slow"):
                time.sleep(SLOW)
            data = files.get(name)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # who asked has hung up
                pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
