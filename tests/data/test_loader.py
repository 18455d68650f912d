"""The loader: exact resume at any number of ranks, faults counted exactly, no hang, all in its place."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.raw_data import SPEC, data_config, finish_folder, good_rows, picture, turns, write_llava, write_manifest
from vlm_nemo.data import encode as encode_module
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.config import DataConfig, PackConfig, PrepareConfig, SourceConfig
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.mixture import Mixture, build_mixture
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import BROKEN_IMAGE, NO_LABEL, TOO_LONG, Drop, ShardImage, ShardSample
from vlm_nemo.data.storage.shards import ShardFolder, index_path
from vlm_nemo.data.storage.write import write_shard
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import Images, UserError


def load(cfg: DataConfig, tokenizer: Tokenizer, rank: int = 0, size: int = 1, **more: Any) -> Loader:
    given = {"seed": 5, "max_tokens": 256} | more
    return Loader(cfg, SPEC, tokenizer, dp_rank=rank, dp_size=size, **given)


def global_steps(
    cfg: DataConfig, tokenizer: Tokenizer, steps: int, size: int = 1, state: dict[str, Any] | None = None
) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Sample positions of every row of every step, put together from all ranks; and the last state."""
    loaders = [load(cfg, tokenizer, rank, size, state=state) for rank in range(size)]
    found = []
    for _ in range(steps):
        datas = [loader.next() for loader in loaders]
        assert all(data.state == datas[0].state and data.seen == datas[0].seen for data in datas)
        state = json.loads(json.dumps(datas[0].state))
        rows = {row: keys for data in datas for (row,), keys in zip(data.rows, data.keys, strict=True)}
        found.append([rows[j] for j in range(cfg.global_packs)])
    for loader in loaders:
        loader.close()
    assert state is not None
    return found, state


def test_any_number_of_ranks_trains_on_the_same_steps(prepared: Path, tokenizer: Tokenizer) -> None:
    cfg = data_config(prepared)
    expected, _ = global_steps(cfg, tokenizer, 12)
    flat = [key for step in expected for row in step for key in row]
    assert len(flat) == len(set(flat)) > 300, "more than two epochs of 140 samples, none twice"
    for size in (2, 4):
        assert global_steps(cfg, tokenizer, 12, size)[0] == expected


@pytest.mark.parametrize("stops", [[1, 2, 3], [4, 1, 2], [0, 5, 1]])
def test_a_run_goes_on_with_other_ranks_and_threads(prepared: Path, tokenizer: Tokenizer, stops: list[int]) -> None:
    expected, _ = global_steps(data_config(prepared), tokenizer, sum(stops) + 4)
    state = None
    found: list[list[list[int]]] = []
    for steps, size, threads in zip([*stops, 4], (4, 2, 1, 2), (1, 3, 2, 1), strict=True):
        if steps:
            part, state = global_steps(data_config(prepared, threads=threads), tokenizer, steps, size, state)
            found += part
    assert found == expected


def test_a_resumed_batch_is_bitwise_the_same(prepared: Path, tokenizer: Tokenizer) -> None:
    cfg = data_config(prepared)
    with closing(load(cfg, tokenizer)) as first:
        state = [first.next() for _ in range(3)][-1].state
        expected = first.next()
    with closing(load(cfg, tokenizer, state=state)) as second:
        again = second.next()
    for a, b in zip(expected.batches, again.batches, strict=True):
        for name in ("tokens", "labels", "positions", "cu_seqlens"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        for field in fields(Images):
            one, other = getattr(a.images, field.name), getattr(b.images, field.name)
            assert one is other is None or torch.equal(one, other)


def test_a_state_of_other_data_is_refused(prepared: Path, tokenizer: Tokenizer) -> None:
    _, state = global_steps(data_config(prepared), tokenizer, 1)
    with pytest.raises(UserError, match="seed=5, this run seed=6"):
        load(data_config(prepared), tokenizer, seed=6, state=state)
    one = {"captions": SourceConfig(path=str(prepared / "captions"))}
    with pytest.raises(UserError, match="sources="):
        load(data_config(prepared, sources=one), tokenizer, state=state)


def test_a_batch_holds_what_the_shards_hold(prepared: Path, tokenizer: Tokenizer) -> None:
    cfg = data_config(prepared)
    folders = {name: ShardFolder(source.path) for name, source in cfg.sources.items()}
    mixture = build_mixture(cfg.sources, {name: len(f) for name, f in folders.items()}, seed=5, shuffle=True)
    kinds: Counter[int] = Counter()
    with closing(load(cfg, tokenizer)) as loader:
        steps = [loader.next() for _ in range(3)]
    for step in steps:
        assert step.seen == sum(step.used.values()) == sum(batch.samples for batch in step.batches)
        for batch, keys in zip(step.batches, step.keys, strict=True):
            bounds, seen_images = batch.cu_seqlens.tolist(), 0
            assert len(keys) == batch.samples
            for key, start, end in zip(keys, bounds, bounds[1:], strict=False):
                place = mixture[key]
                record = folders[place.source].record(place.record)
                plans = [plan_image(SPEC, size) for size in record.sizes]
                text = encode_conversation(record.messages, tokenizer, TEMPLATES["short"], plans)
                tokens, labels = text.tokens, text.labels
                assert batch.tokens[start:end].tolist() == tokens
                assert batch.labels[start : end - 1].tolist() == labels[1:] and batch.labels[end - 1] == -100
                for data in folders[place.source].images(place.record):
                    patches = batch.images.patches[4 * seen_images : 4 * seen_images + 4]
                    assert np.array_equal(patches, decode_image(data, SPEC, torch_resize)[0])
                    seen_images += 1
                kinds[len(record.sizes)] += 1
            assert seen_images == batch.images.count
            assert int((batch.tokens == tokenizer.image_id).sum()) == 4 * seen_images
            assert (batch.tokens[batch.images.slots] == tokenizer.image_id).all()
            assert batch.images.sources.tolist() == list(range(4 * seen_images))
            assert (batch.tokens[batch.used_tokens :] == tokenizer.pad_id).all()
    assert set(kinds) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------ faults


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """100 rows that prepare accepts; 3 have pixels that do not decode, 2 are too long, 1 becomes bad json."""
    rows = good_rows(94)
    for i in range(3):
        rows.append({"id": f"torn{i}", "image": f"torn{i}.jpg", "conversations": turns("<image>", "red")})
    for i in range(2):
        rows.append({"id": f"long{i}", "conversations": turns("x " * 300, "red")})
    rows.append({"id": "json", "conversations": turns("find me", "red")})
    write_llava(tmp_path, rows)
    for i in range(3):
        data = picture(50 + i, (64, 64))
        (tmp_path / "images" / f"torn{i}.jpg").write_bytes(data[: len(data) * 2 // 3])
    cfg = PrepareConfig(
        manifest=str(write_manifest(tmp_path, ("instruct",))),
        out=str(tmp_path / "out"),
        workers=1,
        tokenizer_vocab=320,
    )
    assert prepare(cfg)["instruct"]["records"] == 100
    tar = tmp_path / "out" / "instruct" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"find me"', b'"find m" '[:-1] + b"}"))
    return tmp_path / "out"


def fault_config(folder: Path) -> DataConfig:
    return data_config(folder, sources={"instruct": SourceConfig(path=str(folder / "instruct"))})


def book(ledger: Ledger, datas: list[StepData]) -> None:
    """What the trainer does with the ranks' data of one step."""
    local = [drop for data in datas for drop in data.local_drops]
    used = Counter(datas[0].used)
    used.subtract(drop.source for drop in local)
    assert used.total() == sum(batch.samples for data in datas for batch in data.batches)
    ledger.add(seen=datas[0].seen, used=used, drops=datas[0].planned_drops + local)


@pytest.mark.parametrize("size", [1, 2])
def test_faults_are_counted_exactly(faulty: Path, size: int) -> None:
    tokenizer = Tokenizer(faulty / "tokenizer")
    loaders = [load(fault_config(faulty), tokenizer, rank, size) for rank in range(size)]
    ledger = Ledger()
    accounted: set[int] = set()
    while len(accounted) < 94 or max(accounted) < 100:  # the whole first epoch has passed
        datas = [loader.next() for loader in loaders]
        book(ledger, datas)
        accounted |= {key for data in datas for keys in data.keys for key in keys}
        state = datas[0].state
    for loader in loaders:
        loader.close()
    # Exact expectation: positions 0 to `position`, less the pool, by what is wrong with each record
    mixture = Mixture({"instruct": 100}, {"instruct": 1.0}, seed=5, shuffle=True)
    wrong = dict.fromkeys((94, 95, 96), BROKEN_IMAGE) | dict.fromkeys((97, 98), TOO_LONG) | {99: "bad json"}
    passed = [mixture[i].record for i in range(state["position"]) if i not in state["pool"]]
    expected = Counter(wrong[record] for record in passed if record in wrong)
    assert ledger.dropped == {"instruct": dict(expected)}
    assert ledger.seen == len(passed) and ledger.used == len(passed) - expected.total()
    assert set(expected) == {BROKEN_IMAGE, TOO_LONG, "bad json"}
    with pytest.raises(UserError, match="source instruct .* broken image"):
        ledger.check(0.01, 50)


def test_drops_are_named(faulty: Path) -> None:
    drops: set[Drop] = set()
    with closing(load(fault_config(faulty), Tokenizer(faulty / "tokenizer"))) as loader:
        for _ in range(12):
            data = loader.next()
            drops |= {*data.planned_drops, *data.local_drops}
    names = " ".join(sorted(drop.key for drop in drops))
    for name in ("torn0", "torn1", "torn2", "long0", "long1"):
        assert f"(id {name})" in names
    assert len(drops) == 6


def test_a_sample_whose_image_fails_leaves_its_row(faulty: Path) -> None:
    with closing(load(fault_config(faulty), Tokenizer(faulty / "tokenizer"))) as loader:
        while True:
            data = loader.next()
            if data.local_drops:
                break
    for batch, keys in zip(data.batches, data.keys, strict=True):
        assert batch.cu_seqlens[-1] == 256 == len(batch.tokens) and len(keys) == batch.samples
    assert sum(batch.samples for batch in data.batches) == sum(data.used.values()) - len(data.local_drops)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bad_fraction": 50.0}, r"data\.max_bad_fraction=50 must be a share from 0 to 1"),
        ({"max_bad_fraction": float("nan")}, r"data\.max_bad_fraction=nan must be"),
        ({"min_samples_before_stop": -1}, r"data\.min_samples_before_stop=-1 must be at least 0"),
        ({"pack": PackConfig(capacity=0)}, r"data\.pack\.capacity=0 must be at least 1"),
        (
            {"sources": {"a": SourceConfig(path="nowhere", max_bad_fraction=-1.0)}},
            r"data\.sources\.a\.max_bad_fraction=-1 must be",
        ),
    ],
)
def test_numbers_that_cannot_work(prepared: Path, tokenizer: Tokenizer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(data_config(prepared, **changes), tokenizer)


def test_when_everything_is_bad_the_loader_says_so(prepared: Path, tokenizer: Tokenizer) -> None:
    with closing(load(data_config(prepared), tokenizer, max_tokens=3)) as loader:
        with pytest.raises(UserError, match=r"1000 samples in a row .* too long: \d+ tokens, the limit is 3"):
            loader.next()
        with pytest.raises(UserError, match="in a row"):
            loader.next()


def test_empty_answers_and_wrong_counts_in_shards_are_planned_drops(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Shards that somebody else wrote: prepare did not look at them."""
    image = ShardImage(picture(1), "jpg", 40, 30)
    texts: list[tuple[str, str, list[ShardImage]]] = [
        ("hue?", "red", []),
        ("hue?", " ", []),
        ("hue?", "red", [image]),
        ("<image>", "red", []),
    ]
    samples = [
        ShardSample(
            f"{i:05d}",
            [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
            None,
            f"s{i}",
            images,
        )
        for i, (user, answer, images) in enumerate(texts)
    ]
    write_shard(tmp_path / "00000.tar", samples)
    finish_folder(tmp_path, [4])
    cfg = DataConfig(
        sources={"a": SourceConfig(path=str(tmp_path))},
        template="short",
        shuffle=False,
        global_packs=1,
        pack=PackConfig(capacity=64, pool=4),
    )
    with closing(load(cfg, tokenizer)) as loader:
        data = loader.next()
    assert [drop[1:] for drop in data.planned_drops[:3]] == [
        (NO_LABEL, "00000.tar/00001 (s1)"),
        ("image without <image>", "00000.tar/00002 (s2)"),
        ("<image> without an image", "00000.tar/00003 (s3)"),
    ]
    assert data.seen == sum(data.used.values()) + len(data.planned_drops)


# ------------------------------------------------------------------------------------------------ threads


def test_an_exception_in_a_thread_surfaces(
    prepared: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "decode_images", lambda *args: 1 / 0)
    with closing(load(data_config(prepared), tokenizer)) as loader:
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                loader.next()
        assert time.monotonic() - started < 5


def test_a_shard_that_vanishes_surfaces(faulty: Path) -> None:
    tar = faulty / "instruct" / "00000.tar"
    index_path(tar).unlink()
    with closing(load(fault_config(faulty), Tokenizer(faulty / "tokenizer"))) as loader:
        with pytest.raises(UserError, match=r"00000\.tar\S* cannot be read"):
            loader.next()


def test_a_thread_that_is_gone_is_noticed(
    prepared: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "_produce", lambda self: None)
    with closing(load(data_config(prepared), tokenizer)) as loader:
        with pytest.raises(RuntimeError, match="thread is gone"):
            loader.next()


@pytest.fixture
def thread_count() -> Iterator[int]:
    yield threading.active_count()


def test_close_ends_the_threads(prepared: Path, tokenizer: Tokenizer, thread_count: int) -> None:
    loaders = [load(data_config(prepared), tokenizer) for _ in range(3)]
    loaders[0].next()
    for loader in loaders:
        loader.close()
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            loader.next()
    assert threading.active_count() == thread_count


def test_waiting_is_measured(prepared: Path, tokenizer: Tokenizer) -> None:
    with closing(load(data_config(prepared), tokenizer)) as loader:
        loader.next()
        assert loader.wait_s > 0
        while loader._queue.empty():
            time.sleep(0.01)
        loader.next()
        assert loader.wait_s < 0.5


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"template": "vicunia"}, 1, r"data\.template=vicunia is unknown"),
        ({"global_packs": 3}, 2, r"data\.global_packs=3 .* multiple of 2"),
        ({"pack": PackConfig(pool=0)}, 1, r"data\.pack\.pool=0"),
        ({"threads": -1}, 1, r"data\.threads=-1"),
        ({"global_packs": 6, "micro_packs": 2}, 2, r"micro-batches of 2; make it a multiple of 4"),
        ({"micro_packs": 0}, 1, r"data\.micro_packs=0"),
        ({"pack": PackConfig(vision_capacity=0)}, 1, r"data\.pack\.vision_capacity=0"),
        ({"sources": {}}, 1, "share above 0"),
        ({"sources": {"a": SourceConfig(path="nowhere")}}, 1, r"data\.sources\.a\.path=nowhere holds no shards"),
    ],
)
def test_a_wrong_configuration_says_what_to_change(
    prepared: Path, tokenizer: Tokenizer, changes: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(data_config(prepared, **changes), tokenizer, 0, size)
