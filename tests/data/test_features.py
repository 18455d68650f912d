"""Features on disk: to the bit, whole or not at all, for any number of processes, never for another tower."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_nemo.data.features import FeatureStore, feature_rows, image_key
from vlm_nemo.types import UserError

D = 6


def opened(folder: Path, tower: str = "t", dtype: torch.dtype = torch.float32, **how: float) -> FeatureStore:
    store = FeatureStore(str(folder), how.get("limit_gb", 1.0), writers=int(how.get("writers", 1)))
    store.open(tower, dtype, {"weights": tower})
    return store


def numbers(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


KEYS = [image_key(bytes([i]), ()) for i in range(8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    store = opened(tmp_path, dtype=dtype)
    made = {key: numbers(i, i + 1, dtype) for i, key in enumerate(KEYS)}
    made[KEYS[3]][0, 0], made[KEYS[3]][1, 1] = float("nan"), -0.0
    for key, features in made.items():
        store.add(key, features)
    for again in (store, opened(tmp_path, dtype=dtype)):
        order = [KEYS[5], KEYS[0], KEYS[3], KEYS[5]]
        found = again.read(order, [6, 1, 4, 6])
        assert found is not None and found.dtype == dtype
        expected = torch.cat([made[key] for key in order])
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert all(key in again for key in KEYS) and image_key(b"other", ()) not in again
        assert again.read([KEYS[0]], [2]) is None, "an image of another shape is another image"
    assert store.kept_images == 8 and store.read_images == 4 and store.damaged_images == 0
    assert json.loads((tmp_path / "t" / "tower.json").read_text()) == {"weights": "t"}


def test_another_tower_finds_nothing(tmp_path: Path) -> None:
    opened(tmp_path, "one").add(KEYS[0], numbers(0, 2))
    other = opened(tmp_path, "two")
    assert KEYS[0] not in other and other.read([KEYS[0]], [2]) is None


def test_nobody_looks_before_the_tower_is_known(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path), 1.0)
    stop = threading.Event()
    waiting = threading.Thread(target=store.wait, args=(stop,))
    waiting.start()
    waiting.join(timeout=0.2)
    assert waiting.is_alive()
    stop.set()
    waiting.join(timeout=5)
    assert not waiting.is_alive()


@pytest.mark.parametrize("how", ["a bit", "cut short", "gone", "an entry"])
def test_damage_is_found_counted_and_mended(tmp_path: Path, how: str) -> None:
    first = opened(tmp_path)
    for i, key in enumerate(KEYS[:3]):
        first.add(key, numbers(i, 2))
    (held,) = (tmp_path / "t").glob("*.features")
    (index,) = (tmp_path / "t").glob("*.index")
    if how == "a bit":
        data = bytearray(held.read_bytes())
        data[2 * D * 4 + 3] ^= 1
        held.write_bytes(data)
    elif how == "cut short":
        os.truncate(held, 2 * 2 * D * 4 - 1)
    elif how == "gone":
        held.unlink()
    else:
        data = bytearray(index.read_bytes())
        data[len(data) // 3 + 40] ^= 1
        index.write_bytes(data)
    store = opened(tmp_path)
    assert store.read([KEYS[1]], [2]) is None and KEYS[1] not in store
    assert store.damaged_images == (how != "an entry")
    assert (store.read([KEYS[0]], [2]) is None) == (how == "gone")
    store.add(KEYS[1], numbers(1, 2))
    for again in (store, opened(tmp_path)):
        found = again.read([KEYS[1]], [2])
        assert found is not None and torch.equal(found, numbers(1, 2))


def test_processes_find_what_the_others_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_nemo.data.features.LOOK_SECONDS", 0.0)
    one, two = opened(tmp_path), opened(tmp_path)
    one.add(KEYS[0], numbers(0, 2))
    two.add(KEYS[1], numbers(1, 2))
    two.add(KEYS[1], numbers(1, 2))
    assert KEYS[1] in one and KEYS[0] in two
    found = one.read(KEYS[:2], [2, 2])
    assert found is not None and torch.equal(found, torch.cat((numbers(0, 2), numbers(1, 2))))
    assert two.kept_images == 1 and len(list((tmp_path / "t").glob("*.features"))) == 2


def _write_for_ever(folder: Path, seed: int) -> None:
    store = opened(folder)
    for i in range(10**9):
        store.add(image_key(f"{seed} {i}".encode(), ()), numbers(i, 50))


def test_kill_9_leaves_nothing_half(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_for_ever, args=(tmp_path, seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in tmp_path.glob("t/*.index")) < 20_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    store = opened(tmp_path)
    assert len(store) > 100
    for i, seed in ((i, seed) for seed in range(2) for i in range(10**9)):
        key = image_key(f"{seed} {i}".encode(), ())
        if key not in store:
            break
        found = store.read([key], [50])
        assert found is not None and torch.equal(found, numbers(i, 50))
    assert store.damaged_images == 0


def test_the_limit_holds_for_all_writers_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = 2 * D * 4
    opened(tmp_path, "older").add(KEYS[0], numbers(0, 2))
    stores = [opened(tmp_path, limit_gb=5 * image / 1e9, writers=2) for _ in range(2)]
    for n, store in enumerate(stores):
        for key in KEYS[4 * n : 4 * n + 4]:
            store.add(key, numbers(0, 2))
    assert [store.kept_images for store in stores] == [2, 2]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.features")) == 5 * image
    assert caplog.text.count("nothing more is kept") == 2 and "data.vision_cache_gb" in caplog.text


def test_a_disk_that_is_full_costs_the_cache_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(tmp_path)
    store.add(KEYS[0], numbers(0, 2))
    (tmp_path / "t").chmod(0o500)
    numbers_file, index = store._own or (None, None)
    assert numbers_file is not None and index is not None
    numbers_file.close()
    store._own = (open("/dev/full", "wb", buffering=0), index)
    store.add(KEYS[1], numbers(1, 2))
    (tmp_path / "t").chmod(0o700)
    assert KEYS[1] not in store and "No space left" in caplog.text
    found = store.read([KEYS[0]], [2])
    assert found is not None and torch.equal(found, numbers(0, 2))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.vision_cache_gb=0 must be above 0"):
        FeatureStore(str(tmp_path), 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder"):
        FeatureStore(str(tmp_path / "file"), 1.0)


def test_a_key_is_the_image_and_how_it_is_cut() -> None:
    from vlm_nemo.data.config import LayoutConfig
    from vlm_nemo.data.layout.images import plan_image
    from vlm_nemo.data.layout.spec import image_spec

    spec = image_spec(LayoutConfig(kind="tiles", max_tiles=6), size=32, patch=16)
    cuts = [plan_image(spec, size).canvases for size in ((32, 32), (64, 32), (96, 64))]
    assert len({image_key(data, cut) for cut in cuts for data in (b"one", b"two")}) == 6


def test_rows_of_images_of_several_views() -> None:
    grids, views = torch.tensor([[2, 3], [1, 1], [4, 4]]), torch.tensor([2, 1])
    images: Any = SimpleNamespace(grids=grids, views=views)

    def rows(**spec: Any) -> list[int]:
        return feature_rows(images, SimpleNamespace(**{"class_token": 0, "tiles": None, "grid": (2, 2), **spec}))

    assert rows() == [7, 16] and rows(class_token=1) == [9, 17] and rows(class_token=1, tiles=3) == [15, 15]
