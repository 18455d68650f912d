"""Bytes by range: what a store on a bad day gives is what the local file holds, or one clear error."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.data.http_server import FAULTS, FolderServer, serve_folder
from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.storage.remote import _check_redirect
from vlm_nemo.data.storage.store import LocalStore, MissingFile, Store, open_store, redact, show_url, url_key
from vlm_nemo.types import UserError

QUICK = StoreConfig(tries=12, timeout=0.5, wait=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    (path / "a b.tar").write_bytes(random.Random(0).randbytes(200_000))
    (path / "empty.tar").write_bytes(b"")
    (path / "odd?name#1.tar").write_bytes(b"odd")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with serve_folder(folder) as running:
        yield running


def check_reads(store: Store, folder: Path) -> None:
    whole = (folder / "a b.tar").read_bytes()
    file = store.open("a b.tar")
    assert file.size == len(whole) and store.read_all("a b.tar") == whole
    for offset, size in ((0, 1), (0, len(whole)), (199_999, 1), (1234, 4321), (77, 0)):
        assert file.read(offset, size) == whole[offset : offset + size]
    assert store.read_all("empty.tar") == b"" and store.read_all("odd?name#1.tar") == b"odd"
    assert store.exists("a b.tar") and not store.exists("c.tar")
    with pytest.raises(MissingFile):
        store.open("c.tar")
    with pytest.raises(MissingFile):
        store.read_all("c.tar")


def test_a_local_folder(folder: Path) -> None:
    store = open_store(str(folder), QUICK)
    check_reads(store, folder)
    assert store.list() == ["a b.tar", "empty.tar", "odd?name#1.tar"] and not store.remote
    assert LocalStore(folder / "nowhere").list() == []


def test_a_local_file_that_shrinks_is_named(folder: Path) -> None:
    file = LocalStore(folder).open("a b.tar")
    os.truncate(folder / "a b.tar", 100)
    with pytest.raises(UserError, match=r"a b\.tar became shorter"):
        file.read(50, 100)


def test_local_handles_are_lent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_nemo.data.storage.store.OPEN_FILES", 3)
    for i in range(20):
        (folder / f"{i}.tar").write_bytes(bytes([i]) * 100)
    store = LocalStore(folder)
    files = [store.open(f"{i}.tar") for i in range(20)]
    with ThreadPoolExecutor(4) as threads:  # any thread may take another one's handle away
        got = list(threads.map(lambda i: files[i % 20].read(10, 50), range(2000)))
    assert got == [bytes([i % 20]) * 50 for i in range(2000)]
    # This folder's alone: what other tests leave closing behind them does not count
    kept = [file.path for file in psutil.Process().open_files() if Path(file.path).parent == folder.resolve()]
    assert len(kept) <= 3, kept
    for i in range(1, 4):  # takes the handle of 0.tar away, if a slow thread had it last
        files[i].read(10, 50)
    (folder / "0.tar").write_bytes(b"another")
    with pytest.raises(UserError, match=r"0\.tar changed while it was read"):
        files[0].read(0, 5)


def test_http(server: FolderServer, folder: Path) -> None:
    store = open_store(server.url, QUICK)
    check_reads(store, folder)
    assert all(asked for method, name, asked in server.requests if (method, name) == ("GET", "a b.tar"))


def test_a_folder_that_is_listed_over_http_stays_in_its_host(folder: Path, tmp_path: Path) -> None:
    (folder / "odd?name#1.tar").unlink()
    with serve_folder(tmp_path) as server:
        assert open_store(f"{server.url}/files", QUICK).list() == ["a b.tar", "empty.tar"]


@pytest.mark.parametrize("escaped", [False, True])
def test_names_and_folders_with_spaces(folder: Path, tmp_path: Path, escaped: bool) -> None:
    """As a server writes its links, escaped or not, so that what is listed can be opened; also behind a signature."""
    folder.rename(tmp_path / "my data")
    (tmp_path / "my data" / "odd?name#1.tar").rename(tmp_path / "my data" / "50%25.tar")
    if not escaped:
        (tmp_path / "my data" / "50%25.tar").unlink()
    with serve_folder(tmp_path) as server:
        server.escape = escaped
        for path in ("my%20data", "my data/", "my%20data?sig=secret", "my data/?X-Amz-Signature=a/b"):
            store = open_store(f"{server.url}/{path}", QUICK)
            assert store.list() == (["50%25.tar"] if escaped else []) + ["a b.tar", "empty.tar"]
            assert [store.open(name).size for name in store.list()] == [3] * escaped + [200_000, 0]


def test_an_object_store(folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/files/{path.name}", path.read_bytes())
    store = open_store("memory://bucket/files", QUICK)
    check_reads(store, folder)
    assert store.list() == ["a b.tar", "empty.tar", "odd?name#1.tar"]
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe://x",
        "file:///etc/passwd",
        "simplecache::http://127.0.0.1/x",
        "http://127.0.0.1/x::zip://a",
        "zip://a.zip",
        "ftp://h/x",
        "github://u:r@main/x",
        "local:///x",
    ],
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="one URL of http, https, s3, gs$"):
        open_store(url, QUICK)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_tried_again(server: FolderServer, folder: Path, fault: str) -> None:
    server.faulty, server.faults = 0.4, (fault,)
    whole = (folder / "a b.tar").read_bytes()
    file = open_store(server.url, StoreConfig(tries=30, timeout=0.3, wait=0.001)).open("a b.tar")
    for offset in range(0, 20_000, 1700):
        assert file.read(offset, 3000) == whole[offset : offset + 3000]
    assert server.made[fault] > 2


def test_what_fails_for_good_is_one_line_without_secrets(server: FolderServer) -> None:
    url = server.url.replace("http://", "http://user:secret@") + "/?token=secret"
    store = open_store(url, StoreConfig(tries=3, timeout=0.5, wait=0.001))
    with pytest.raises(MissingFile) as missing:
        store.open("c.tar")
    assert str(missing.value) == f"{server.url}/c.tar is not there (status 404)"
    assert len(server.requests) <= 2, "not tried again"
    file = store.open("a b.tar")
    server.faulty, server.faults = 1.0, ("status 500",)
    with pytest.raises(UserError) as caught:
        file.read(0, 10)
    text = str(caught.value)
    assert text.startswith(f"{server.url}/a%20b.tar cannot be read: status 500, after 3 tries")
    assert "secret" not in text and "\n" not in text
    server.faults, server.made = ("status 403",), type(server.made)()
    with pytest.raises(UserError, match="status 403$"):
        file.read(0, 10)
    assert server.made["status 403"] == 1, "a refusal is not tried again"


def test_a_stall_and_a_closed_port_are_noticed(server: FolderServer) -> None:
    file = open_store(server.url, StoreConfig(tries=2, timeout=0.3, wait=0.01)).open("a b.tar")
    server.faulty, server.faults = 1.0, ("stall",)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.3 s, after 2 tries"):
        file.read(0, 100_000)
    assert time.monotonic() - started < 2.5
    with pytest.raises(UserError, match="after 2 tries"):
        open_store("http://127.0.0.1:9", StoreConfig(tries=2, timeout=1, wait=0.01)).open("a.tar")


def test_a_file_that_changes_is_not_mixed(server: FolderServer, folder: Path) -> None:
    file = open_store(server.url, QUICK).open("a b.tar")
    (folder / "a b.tar").write_bytes(random.Random(1).randbytes(200_000))
    os.utime(folder / "a b.tar", (1, 1))
    with pytest.raises(UserError, match="changed while it was read"):
        file.read(10, 10)
    server.etags = False
    file = open_store(server.url, QUICK).open("a b.tar")
    (folder / "a b.tar").write_bytes(bytes(200_001))
    with pytest.raises(UserError, match="changed while it was read"):
        file.read(10, 10)


def test_a_server_without_ranges_is_named_before_a_tar_is_loaded(server: FolderServer) -> None:
    server.ranges = False
    store = open_store(server.url, QUICK)
    with pytest.raises(UserError, match="does not serve ranges"):
        store.open("a b.tar").read(10, 10)
    assert len(store.read_all("a b.tar")) == 200_000


def test_redirects_stay_in_http(server: FolderServer, folder: Path) -> None:
    with serve_folder(folder) as other:
        server.redirect = f"{other.url}/a%20b.tar"
        store = open_store(server.url, StoreConfig(tries=2, timeout=1, wait=0.01))
        assert store.open("x.tar").read(5, 5) == (folder / "a b.tar").read_bytes()[5:10]
    for target in ("file:///etc/passwd", "ftp://h/x"):
        server.redirect = target
        with pytest.raises(UserError):
            open_store(server.url, StoreConfig(tries=2, timeout=1, wait=0.01)).open("y.tar")


def test_https_never_becomes_http() -> None:
    from yarl import URL

    closed: list[bool] = []
    answer = SimpleNamespace(headers={"Location": "http://h/x"}, close=lambda: closed.append(True))
    with pytest.raises(UserError, match="https://h/x redirects from https to http"):
        asyncio.run(_check_redirect(None, None, SimpleNamespace(url=URL("https://h/x?sig=1"), response=answer)))
    assert closed


def test_hard_use_from_many_threads(server: FolderServer, folder: Path) -> None:
    """A sixth of all answers is wrong in some way; every byte is right, and nothing is left open."""
    server.faulty = 1 / 6
    whole = (folder / "a b.tar").read_bytes()
    store = open_store(server.url, StoreConfig(tries=20, timeout=2.0, wait=0.001))
    file = store.open("a b.tar")
    handles, running = psutil.Process().num_fds(), threading.active_count()
    spans = [(random.Random(i).randrange(190_000), 5000) for i in range(300)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda span: file.read(*span), spans))
    assert got == [whole[offset : offset + size] for offset, size in spans]
    assert set(server.made) == {"", *FAULTS}
    assert psutil.Process().num_fds() < handles + 100 and threading.active_count() < running + 40


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, module in (("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"^{url} cannot be read: [^\n]*{module}"):
            open_store(url, QUICK)


def test_secrets_are_not_shown() -> None:
    assert show_url("https://u:p@h.example/a/b?X-Amz-Signature=1#f") == "https://h.example/a/b"
    assert show_url("cannot reach https://u:p@h/a?s=1 (see s3://k@b/c)") == "cannot reach https://h/a (see s3://b/c)"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@ss@h/x", "http://h/x"),
        ("s3://a:b/c@bucket", "s3://bucket"),
        ("s3://a:b/c@bucket/d/e.tar", "s3://bucket/d/e.tar"),
        ("http://u:12@h/x", "http://h/x"),
        ("http://u:p?q@h/a", "http://h/a"),
        ("http://u:p#q@h/a?sig=2", "http://h/a"),
        ("http://u:p@h/a?x=b@c", "http://h/a"),
        ("http://k@e@h/x", "http://h/x"),
        ("http://h:80/a@b/c", "http://h:80/a@b/c"),
        ("http://[::1]:8000/a", "http://[::1]:8000/a"),
    ],
)
def test_odd_passwords_are_not_shown(url: str, shown: str) -> None:
    assert show_url(url) == shown and show_url(f"({url!r}) and more") == f"({shown!r}) and more"
    assert redact({"a": [url, "a?b@c", 3], "b": {"c": None}}) == {"a": [shown, "a?b@c", 3], "b": {"c": None}}


def test_keys_hold_no_secret_and_no_signature() -> None:
    first = url_key("https://u:p@h/a/b.tar?X-Amz-Date=1&X-Amz-Signature=2&id=3#f")
    assert first == url_key("https://h/a/b.tar?id=3&sig=another&se=2027") == "https://h/a/b.tar?id=3"
    assert url_key("https://h/get?id=3") != url_key("https://h/get?id=4")
    assert url_key("s3://k:s@bucket/a b") == "s3://bucket/a b" and url_key("/local/a?b@c") == "/local/a?b@c"


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"timeout": 0.0}, {"wait": -1.0}])
def test_senseless_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"data\.store"):
        open_store("http://127.0.0.1:9", StoreConfig(**wrong))  # type: ignore[arg-type]
