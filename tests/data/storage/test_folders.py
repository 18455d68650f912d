"""Prepared folders behind a store: over HTTP on a bad day they give what the local disk gives; damage is found."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.data.http_server import STALLS_SELDOM, FolderServer, serve_folder
from tests.data.raw_data import SPEC, data_config
from vlm_nemo.data.config import DataConfig, SourceConfig, StoreConfig
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import Folder, open_folder
from vlm_nemo.data.storage.shards import ShardFolder, index_path
from vlm_nemo.data.storage.verify import verify
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


def store(folder: Path, **changes: object) -> StoreConfig:
    given = {"cache_dir": str(folder / "cache"), "tries": 20, "timeout": 0.3, "wait": 0.001}
    return StoreConfig(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "prepared"))


@pytest.fixture
def server(copy: Path) -> Iterator[FolderServer]:
    with serve_folder(copy) as running:
        yield running


def same(ours: Folder, theirs: Folder) -> None:
    assert len(ours) == len(theirs)

    def check(i: int) -> None:
        assert ours.record(i) == theirs.record(i) and ours.images(i) == theirs.images(i)
        assert ours.sizes(i) == theirs.sizes(i) and ours.key(i) == theirs.key(i)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, reversed(range(len(theirs)))))


@pytest.mark.parametrize("cache_gb", [1.0, 1e-6, 0.0])
def test_over_http_on_a_bad_day(server: FolderServer, copy: Path, tmp_path: Path, cache_gb: float) -> None:
    server.faulty, server.faults = 0.15, STALLS_SELDOM
    for source in ("captions", "instruct"):
        cache = Cache(store(tmp_path, cache_gb=cache_gb))
        same(open_folder(f"{server.url}/{source}", cache=cache), open_folder(str(copy / source)))
    assert len(server.made) > 3
    assert not any(name.endswith(("captions", "captions/")) for _, name, _ in server.requests), "nothing was listed"
    assert psutil.Process().num_fds() < 200


def test_what_is_kept_is_not_fetched_again(server: FolderServer, copy: Path, tmp_path: Path) -> None:
    for _ in range(2):
        server.requests.clear()
        same(
            open_folder(f"{server.url}/captions", cache=Cache(store(tmp_path))),
            open_folder(str(copy / "captions")),
        )
    assert {name for method, name, _ in server.requests if method == "GET"} == {"captions/manifest.json"}


def test_a_source_larger_than_the_cache_is_read_by_exact_ranges(
    server: FolderServer, copy: Path, tmp_path: Path
) -> None:
    folder = open_folder(f"{server.url}/captions", cache=Cache(store(tmp_path, cache_gb=1e-6)))
    local = ShardFolder(copy / "captions")
    server.requests.clear()
    (image,) = folder.images(7)
    asked = [span for method, name, span in server.requests if method == "GET" and name.endswith(".tar")]
    assert len(asked) == 1 and image == local.images(7)[0]
    first, last = (int(part) for part in str(asked[0]).removeprefix("bytes=").split("-"))
    assert last - first + 1 == len(image)


def test_lengths_and_excluded_records_come_over_http(server: FolderServer, copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from tests.data.storage.test_shards import exclude

    for tar in copy.glob("captions/*.tar"):
        count = (
            len(np.asarray(ShardFolder(copy / "captions")._counts)[[int(tar.stem)]])
            and ShardFolder(copy / "captions")._counts[int(tar.stem)]
        )
        save_file({"text_tokens": np.arange(count, dtype=np.int32)}, f"{tar}.lengths-{'a' * 12}.safetensors")
    exclude(copy / "captions", [0, 30])
    folder = open_folder(f"{server.url}/captions", cache=Cache(store(tmp_path)))
    same(folder, open_folder(str(copy / "captions")))
    lengths, expected = folder.text_tokens("a" * 12), open_folder(str(copy / "captions")).text_tokens("a" * 12)
    assert lengths is not None and expected is not None and lengths.tolist() == expected.tolist()
    assert len(lengths) == 58 and folder.text_tokens("b" * 12) is None


def batches(cfg: DataConfig, tokenizer: Tokenizer) -> list[tuple[list[list[int]], list[bytes]]]:
    loader = Loader(cfg, SPEC, tokenizer, seed=3, max_tokens=256, dp_rank=0, dp_size=1)
    try:
        steps = [loader.next() for _ in range(3)]
    finally:
        loader.close()
    assert not any(step.planned_drops or step.local_drops for step in steps)
    return [
        (step.keys, [b.tokens.numpy().tobytes() + b.images.patches.numpy().tobytes() for b in step.batches])
        for step in steps
    ]


def test_training_from_a_store_on_a_bad_day_sees_the_same_batches(
    server: FolderServer, copy: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    local = data_config(copy, global_packs=2)
    server.faulty, server.faults = 0.1, STALLS_SELDOM
    sources = {name: SourceConfig(path=f"{server.url}/{name}", weight=s.weight) for name, s in local.sources.items()}
    remote = data_config(copy, sources=sources, global_packs=2, store=store(tmp_path, cache_gb=1e-6))
    assert batches(remote, tokenizer) == batches(local, tokenizer)
    assert sum(count for fault, count in server.made.items() if fault) > 10


def test_a_shard_that_is_gone_or_changed_is_one_clear_line(server: FolderServer, copy: Path, tmp_path: Path) -> None:
    (copy / "captions" / "00001.tar").unlink()
    folder = open_folder(f"{server.url}/captions", cache=Cache(store(tmp_path)))
    assert folder.record(0)
    with pytest.raises(UserError, match=r"^shard http\S+/00001\.tar cannot be read[^\n]*status 404[^\n]*again$"):
        folder.record(25)
    shutil.copy(index_path(copy / "captions" / "00000.tar"), index_path(copy / "captions" / "00002.tar"))
    with pytest.raises(UserError, match=r"00002\.tar is not the one that manifest\.json names"):
        folder.record(30)
    with pytest.raises(UserError, match="holds no shards"):
        open_folder(f"{server.url}/nowhere/{{0..1}}", cache=Cache(store(tmp_path)))


def test_an_index_that_points_elsewhere_cannot_leave_the_folder(copy: Path) -> None:
    path = copy / "captions" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("../instruct/00000.tar", "/etc/passwd", "..", "http://h/x.tar"):
        manifest["shards"][0]["name"] = name
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="not a file of that folder"):
            open_folder(str(copy / "captions"))


def test_verify_finds_nothing_in_what_was_just_prepared(server: FolderServer, copy: Path, tmp_path: Path) -> None:
    names: list[str] = []
    assert list(verify(ShardFolder(copy / "instruct"), names.append)) == []
    assert names == [f"{i:05d}.tar" for i in range(len(names))] and names
    remote = ShardFolder(f"{server.url}/captions", cache=Cache(store(tmp_path)))
    assert list(verify(remote)) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut at a member", r"damaged or cut after 30 members"),
        ("bad header", r"damaged or cut after 30 members"),
        ("fewer members", r"holds 50 members|holds 30 members, its index 25 records and 25 images"),
        ("bit of an image", r"has the SHA-256"),
        ("bit of the index", r"the index of \S+ has the SHA-256|cannot be read"),
        ("gone", r"cannot be read"),
    ],
)
def test_verify_names_the_damaged_shard(copy: Path, damage: str, said: str) -> None:
    tar = copy / "captions" / "00000.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        members = list(archive)
    middle = members[30].offset
    if damage == "cut at a member":
        data = data[:middle]
    elif damage == "bad header":
        data[middle : middle + 200] = b"\xff" * 200
    elif damage == "fewer members":  # and the end of a tar, as a careless tool would write it
        data[middle:] = bytes(10240)
    elif damage == "bit of an image":
        data[members[0].offset_data + 300] ^= 1
    elif damage == "bit of the index":
        index = bytearray(index_path(tar).read_bytes())
        index[-1] ^= 1
        index_path(tar).write_bytes(index)
    tar.write_bytes(data)
    if damage == "gone":
        tar.unlink()
    ((name, problem),) = verify(ShardFolder(copy / "captions"))
    assert name == "00000.tar" and re.search(said, problem), problem
