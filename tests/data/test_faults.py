"""Faults in the data and in the engine: counted to the sample, said in time, and never a rank that waits for ever."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.data.http_server import serve_folder
from tests.data.raw_data import SPEC, finish_folder, picture, write_all_lengths
from vlm_nemo.data import loader as loader_module
from vlm_nemo.data.config import DataConfig, PackConfig, SourceConfig, StoreConfig
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.sample import BAD_JSON, BROKEN_IMAGE, WRONG_LENGTH, NothingUsable, ShardImage, ShardSample
from vlm_nemo.data.storage.write import write_shard
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.train.trainer import Trainer
from vlm_nemo.types import UserError

GOOD = picture(3)
BAD_IMAGES = {
    "torn": GOOD[: len(GOOD) // 2],
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}


def write_source(folder: Path, records: int, bad: dict[int, str], shards: int = 1) -> None:
    """Shards as somebody might hand them over: image i is what `bad` says, or its json is cut ("json")."""
    folder.mkdir(parents=True)
    counts = []
    for s in range(shards):
        own = range(s * records // shards, (s + 1) * records // shards)
        samples = []
        for i in own:
            messages = [
                {"role": "user", "content": "<image>\nhue?"},
                {"role": "assistant", "content": f"red {'no' if bad.get(i) == 'json' else i}"},
            ]
            image = ShardImage(BAD_IMAGES.get(bad.get(i, ""), GOOD), "jpg", 40, 30)
            samples.append(ShardSample(f"{i:06d}", messages, None, f"s{i}", [image]))  # type: ignore[arg-type]
        tar = folder / f"{s:05d}.tar"
        write_shard(tar, samples)
        tar.write_bytes(tar.read_bytes().replace(b'"red no"', b'"red no}'))
        counts.append(len(own))
    finish_folder(folder, counts)


def config(sources: dict[str, Path], **changes: Any) -> DataConfig:
    given: dict[str, Any] = {
        "sources": {name: SourceConfig(path=str(path)) for name, path in sources.items()},
        "template": "short",
        "pack": PackConfig(capacity=128, pool=8),
        "global_packs": 6,
    }
    return DataConfig(**(given | changes))


def load(cfg: DataConfig, tokenizer: Tokenizer, rank: int = 0, size: int = 1, **more: Any) -> Loader:
    return Loader(cfg, SPEC, tokenizer, seed=5, max_tokens=128, dp_rank=rank, dp_size=size, **more)


def book(ledger: Ledger, datas: list[StepData]) -> None:
    """What a training run does with its replicas' data of one step."""
    local = [drop for data in datas for drop in data.local_drops]
    used = Counter(datas[0].used)
    used.subtract(drop.source for drop in local)
    assert used.total() == sum(batch.samples for data in datas for batch in data.batches)
    ledger.add(seen=datas[0].seen, used=used, drops=[*datas[0].planned_drops, *local])
    state = datas[0].state
    ledger.assert_whole(state["position"] - len(state["pool"]))


@pytest.mark.parametrize("measured", ["no lengths", "lengths", "lengths of the whole data"])
@pytest.mark.parametrize("size", [1, 3])
def test_one_in_a_hundred(size: int, measured: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every fault is counted, by source and reason, exactly; the budget of one source stops the run and names it."""
    rng = random.Random(1)
    bad = dict(zip(rng.sample(range(800), 8), ["torn", "empty", "html", "json"] * 2, strict=True))
    write_source(tmp_path / "web" / "a", 800, bad if measured != "lengths of the whole data" else {}, shards=2)
    write_source(tmp_path / "good" / "a", 300, {})
    if measured != "no lengths":
        write_all_lengths(tmp_path / "web", tokenizer=tokenizer)
        write_all_lengths(tmp_path / "good", tokenizer=tokenizer)
    if measured == "lengths of the whole data":  # what the sidecar knows nothing of is found when the record is read
        kept = {path.name: path.read_bytes() for path in (tmp_path / "web" / "a").glob("*lengths*")}
        shutil.rmtree(tmp_path / "web" / "a")
        write_source(tmp_path / "web" / "a", 800, bad, shards=2)
        for name, data in kept.items():
            (tmp_path / "web" / "a" / name).write_bytes(data)
    cfg = config({})
    cfg.sources = {
        "web": SourceConfig(path=str(tmp_path / "web" / "a"), epochs=1),
        "good": SourceConfig(path=str(tmp_path / "good" / "a"), epochs=1),
    }
    ledger, stopped = Ledger(), None
    loaders = [load(cfg, tokenizer, rank, size) for rank in range(size)]
    while True:
        datas = [loader.next() for loader in loaders]
        book(ledger, datas)
        ledger.check(0.02, 100)
        if stopped is None:
            try:
                ledger.check(0.02, 100, own={"web": 0.004})
            except UserError as error:
                stopped = str(error)
        if datas[0].state["position"] - 8 >= 1100:
            break
    for loader in loaders:
        loader.close()
    # One cycle of the blend has each record once: what waits, and what a second cycle began, is told by position
    mixture = loaders[0]._planner._mixture
    waiting = set(datas[0].state["pool"])
    passed = [mixture[i] for i in range(datas[0].state["position"]) if i not in waiting]
    expected = Counter(
        BAD_JSON if bad[p.record] == "json" else BROKEN_IMAGE for p in passed if p.source == "web" and p.record in bad
    )
    assert ledger.dropped == {"web": dict(expected)} and expected.total() >= 7
    assert {name: account.seen for name, account in ledger.sources.items()} == Counter(p.source for p in passed)
    assert stopped is not None
    assert "samples of source web had to be dropped" in stopped and "data.sources.web.max_bad_fraction=0.004" in stopped
    assert "(00000.tar/" in stopped or "(00001.tar/" in stopped


def test_a_budget_of_one_is_a_budget(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Any number of bad samples in a row, as long as one is usable; where none is, the run ends and has counted all."""
    write_source(tmp_path / "some" / "a", 1200, dict.fromkeys(range(1150), "json"))
    write_source(tmp_path / "none" / "a", 1100, dict.fromkeys(range(1100), "json"))
    cfg = config({"a": tmp_path / "some" / "a"}, shuffle=False, global_packs=1, max_bad_fraction=1.0)
    with closing(load(cfg, tokenizer)) as loader:
        data = loader.next()
    assert len(data.planned_drops) == 1150 and data.used["a"] > 0
    cfg.max_bad_fraction = 0.5
    with closing(load(cfg, tokenizer)) as loader, pytest.raises(NothingUsable, match="1000 samples in a row"):
        loader.next()
    cfg.sources["a"] = SourceConfig(path=str(tmp_path / "none" / "a"), max_bad_fraction=1.0)
    with closing(load(cfg, tokenizer)) as loader, pytest.raises(NothingUsable, match="1100 samples in a row") as error:
        loader.next()
    assert len(error.value.drops) == 1100

    trainer = Trainer.__new__(Trainer)
    trainer.run_dir, trainer.ranks, trainer.metrics = tmp_path, Mock(main=True), None
    trainer.ledger, trainer.loader = Ledger(), Mock(next=Mock(side_effect=error.value))
    trainer._say = Mock()  # type: ignore[method-assign]
    with pytest.raises(NothingUsable):
        trainer._next()
    told = json.loads((tmp_path / "ledger.json").read_text())
    assert told["seen"] == 1100 and told["dropped"] == {"a": {BAD_JSON: 1100}}
    assert "1,100" in trainer._say.call_args[0][0]


def test_lengths_of_other_data_drop_samples_and_crash_nobody(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_source(tmp_path / "a" / "a", 40, {})
    write_all_lengths(tmp_path / "a", tokenizer=tokenizer)
    sidecar = next((tmp_path / "a" / "a").glob("*lengths*"))
    kept = sidecar.read_bytes()
    tar = tmp_path / "a" / "a" / "00000.tar"
    for i in (7, 8):
        tar.write_bytes(tar.read_bytes().replace(f'"red {i}"'.encode(), f'"blk {i}"'.encode()))
    sidecar.write_bytes(kept)
    with closing(load(config({"a": tmp_path / "a" / "a"}, shuffle=False, global_packs=2), tokenizer)) as loader:
        datas = [loader.next() for _ in range(4)]
    drops = [drop for data in datas for drop in data.local_drops]
    assert {drop.key for drop in drops if drop.reason == WRONG_LENGTH} == {
        "00000.tar/000007 (s7)",
        "00000.tar/000008 (s8)",
    }
    for data in datas:
        assert all(len(batch.tokens) == 128 == batch.cu_seqlens[-1] for batch in data.batches)


def test_uneven_shards_end_no_epoch_early(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Three shards of 17 records and one of 1, four replicas: every epoch goes on into the next, in step."""
    write_source(tmp_path / "a", 17, {}, shards=5)
    write_source(tmp_path / "b", 1, {})
    cfg = config({"a": tmp_path / "a", "b": tmp_path / "b"}, global_packs=4)
    cfg.sources["b"].weight = 0.2
    loaders = [load(cfg, tokenizer, rank, 4) for rank in range(4)]
    seen: Counter[tuple[str, int, int]] = Counter()
    done = threading.Event()

    def run() -> None:
        for _ in range(12):
            datas = [loader.next() for loader in loaders]
            assert all(data.state == datas[0].state and len(data.batches) == 1 for data in datas)
            mixture = loaders[0]._planner._mixture
            seen.update(tuple(mixture[i]) for data in datas for keys in data.keys for i in keys)
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    for loader in loaders:
        loader.close()
    assert done.is_set(), "it hangs"
    assert set(seen.values()) == {1}
    epochs = {epoch for source, epoch, _ in seen if source == "a"}
    assert len(epochs) >= 3
    for epoch in sorted(epochs)[:-2]:
        assert {record for source, e, record in seen if source == "a" and e == epoch} == set(range(17))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_dead_thread_is_an_error_within_seconds(
    threads: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planning thread ends without a word; a decoding thread dies of a bug; next() says so, every time."""
    write_source(tmp_path / "a", 30, {})
    cfg = config({"a": tmp_path / "a"}, threads=threads)
    made, real = [], Loader._build

    def dying(self: Loader, *args: Any) -> StepData:
        made.append(1)
        if len(made) == 2:
            raise SystemExit  # what ends a thread silently
        return real(self, *args)

    monkeypatch.setattr(Loader, "_build", dying)
    with closing(load(cfg, tokenizer)) as loader:
        loader.next()
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(SystemExit):
                loader.next()
        assert time.monotonic() - started < 5
    monkeypatch.setattr(Loader, "_build", real)

    monkeypatch.setattr(Loader, "_read", lambda self, sample: [][0])
    with closing(load(cfg, tokenizer)) as loader:
        started = time.monotonic()
        with pytest.raises(IndexError):
            loader.next()
        assert time.monotonic() - started < 5
    assert loader_module._PATIENCE < 2


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("fault", ["stall", "status 500"])
def test_close_waits_for_no_store(threads: int, fault: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A read is under way, or between two of its many tries."""
    write_source(tmp_path / "a", 60, {})
    store = StoreConfig(cache_dir=str(tmp_path / "cache"), cache_gb=0, tries=20, timeout=20, wait=20)
    with serve_folder(tmp_path) as server:
        cfg = config({}, threads=threads, prefetch=1, store=store)
        cfg.sources = {"a": SourceConfig(path=f"{server.url}/a")}
        with closing(load(cfg, tokenizer)) as loader:
            loader.next()
            server.faulty, server.faults = 1.0, (fault,)
            while not server.made[fault]:
                if not loader._queue.empty():
                    loader.next()
                time.sleep(0.02)
            time.sleep(0.2)  # the answer, if any, has come
            started = time.monotonic()
            loader.close()
            assert time.monotonic() - started < 2
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlm_nemo.d")]
