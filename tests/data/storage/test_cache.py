"""The disk cache: bytes are right, the limit holds, damage and changes are noticed, processes may share it."""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_nemo.data.config import StoreConfig
from vlm_nemo.data.storage import cache as module
from vlm_nemo.data.storage.cache import Cache, CachedFile
from vlm_nemo.types import UserError

BLOCK = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)


class Far:
    """A file that counts what is asked of it."""

    def __init__(self, data: bytes, version: str = "1") -> None:
        self.where, self.size, self.version = "http://h/f", len(data), version
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append((offset, size))
        return self.data[offset : offset + size]


def make(folder: Path, limit: float = 1e9) -> Cache:
    return Cache(StoreConfig(cache_dir=str(folder), cache_gb=limit / 1e9))


def blocks(folder: Path) -> list[Path]:
    return [path for path in (folder / "blocks").rglob("*") if path.is_file()]


DATA = random.Random(0).randbytes(10_500)


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 10_500), st.integers(0, 4000)), max_size=8), data=st.data())
def test_any_spans_are_the_files_bytes(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    far = Far(DATA)
    file = CachedFile(far, "u", "", make(folder, limit=data.draw(st.sampled_from([1e9, 3500.0]))))
    for offset, size in spans:
        size = min(size, len(DATA) - offset)
        assert file.read(offset, size) == DATA[offset : offset + size]


def test_a_block_is_fetched_once_and_survives_the_process(tmp_path: Path) -> None:
    far = Far(DATA)
    for _ in range(2):
        file = CachedFile(far, "u", "", make(tmp_path))
        for _ in range(3):
            assert file.read(1500, 2000) == DATA[1500:3500]
    assert far.reads == [(1000, 1000), (2000, 1000), (3000, 1000)]
    with pytest.raises(UserError, match="10500 bytes, not the 10501"):
        file.read(10_000, 501)


def test_another_state_of_a_file_is_another_file(tmp_path: Path) -> None:
    cache = make(tmp_path)
    assert CachedFile(Far(b"a" * 2000), "u", "", cache).read(0, 5) == b"aaaaa"
    for url, far, version in (
        ("u", Far(b"b" * 2000, version="2"), ""),
        ("u", Far(b"b" * 2001), ""),
        ("u", Far(b"b" * 2000), "sha"),
        ("v", Far(b"b" * 2000), ""),
    ):
        assert CachedFile(far, url, version, cache).read(0, 5) == b"bbbbb"


def test_threads_fetch_a_block_once(tmp_path: Path) -> None:
    far = Far(DATA)
    file = CachedFile(far, "u", "", make(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: file.read(0, 3000), range(64))) == {DATA[:3000]}
    assert sorted(far.reads) == [(0, 1000), (1000, 1000), (2000, 1000)]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "head"])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    CachedFile(Far(DATA), "u", "", make(tmp_path)).read(0, 1000)
    (block,) = blocks(tmp_path)
    data = bytearray(block.read_bytes())
    if damage == "flip":
        data[500] ^= 1
    elif damage == "head":
        data[3] ^= 1
    block.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}.get(damage, bytes(data)))
    far = Far(DATA)
    assert CachedFile(far, "u", "", make(tmp_path)).read(10, 20) == DATA[10:30] and len(far.reads) == 1
    assert "damaged" in caplog.text
    assert CachedFile(far, "u", "", make(tmp_path)).read(10, 20) == DATA[10:30] and len(far.reads) == 1


def test_the_limit_holds_and_the_least_used_goes(tmp_path: Path) -> None:
    cache = make(tmp_path, limit=5000)
    file = CachedFile(Far(DATA), "u", "", cache)
    for number in range(4):
        file.read(number * BLOCK, BLOCK)
    for i, number in enumerate((1, 2, 3, 0)):  # block 0 was used last
        (path,) = [p for p in blocks(tmp_path) if p.name.endswith(f"-{number}")]
        os.utime(path, (1000 + i, 1000 + i))
    for number in range(4, 10):
        file.read(number * BLOCK, BLOCK)
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 5000
        if number == 4:
            left = {path.name.split("-")[1] for path in blocks(tmp_path)}
            assert "1" not in left and {"0", "4"} <= left
    assert file.read(0, len(DATA)) == DATA


def test_half_written_blocks_of_dead_processes_go(tmp_path: Path) -> None:
    (tmp_path / "blocks" / "aa").mkdir(parents=True)
    old, young = tmp_path / "blocks/aa/x.1-1.part", tmp_path / "blocks/aa/y.1-1.part"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    CachedFile(Far(DATA), "u", "", make(tmp_path)).read(0, 1)
    assert not old.exists() and young.exists()


def test_without_a_folder_to_write_it_reads_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = make(tmp_path / "file" / "cache")
    file = CachedFile(Far(DATA), "u", "", cache)
    assert file.read(0, 5000) == DATA[:5000]
    assert caplog.text.count("cannot be written") == 1
    assert cache.index("x", lambda: b"made") == b"made"


def test_a_source_that_does_not_fit_is_not_admitted(tmp_path: Path) -> None:
    cache = make(tmp_path, limit=1000)
    assert [cache.admit(size) for size in (600, 600, 400, 1)] == [True, False, True, False]


def test_an_index_is_made_once(tmp_path: Path) -> None:
    made = []

    def build() -> bytes:
        made.append(1)
        return b"index"

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: make(tmp_path).index("n", build), range(8))) == {b"index"}
    assert len(made) == 1
    (tmp_path / "indexes" / "n").write_bytes(b"damaged")
    assert make(tmp_path).index("n", build) == b"index" and len(made) == 2


def hammer(folder: str, seed: int) -> int:
    """Read at random through a cache that is far too small."""
    module.BLOCK = BLOCK
    cache = make(Path(folder), limit=6000)
    files = [CachedFile(Far(bytes([i]) * 10_500), f"u{i}", "", cache) for i in range(3)]
    rng = random.Random(seed)
    for _ in range(300):
        i, offset = rng.randrange(3), rng.randrange(9000)
        assert files[i].read(offset, 1500) == bytes([i]) * 1500
    return sum(path.stat().st_size for path in blocks(Path(folder)) if path.exists())


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        used = pool.starmap(hammer, [(str(tmp_path), seed) for seed in range(2)])
    assert max(used) <= 6000 + 2 * 1100  # a block each, between two looks
    assert not [path for path in blocks(tmp_path) if path.name.endswith(".part")]
