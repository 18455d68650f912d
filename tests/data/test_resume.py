"""Exact, elastic resume by ids: stopped anywhere, gone on with any number of replicas and threads, nothing changes.

A sample's id is its position in the global order. Lengths lie beside the shards, so planning reads nothing: the tests
of the plan alone go through hundreds of packs in a moment.
"""

from __future__ import annotations

import json
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.raw_data import SPEC, data_config, make_prepared, picture, write_all_lengths, write_img2dataset
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import AugmentConfig, DataConfig, PackConfig, SourceConfig, StoreConfig
from vlm_nemo.data.encode import Encoder
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.mixture import build_mixture
from vlm_nemo.data.planner import Planner
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import Folder, open_folder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

RECORDS = 140


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared = make_prepared(tmp_path_factory.mktemp("raw"))
    write_all_lengths(prepared)
    return prepared


@pytest.fixture(scope="module")
def tokenizer(measured: Path) -> Tokenizer:
    return Tokenizer(measured / "tokenizer")


def config(measured: Path, **changes: Any) -> DataConfig:
    """Twelve rows a step."""
    given = {"global_packs": 12, "pack": PackConfig(capacity=192, pool=16)}
    return data_config(measured, **(given | changes))


def blend(measured: Path) -> dict[str, SourceConfig]:
    return {
        "captions": SourceConfig(path=str(measured / "captions"), epochs=0.5),
        "instruct": SourceConfig(path=str(measured / "instruct"), samples=100),
    }


def steps(
    cfg: DataConfig, tokenizer: Tokenizer, count: int, size: int = 1, state: dict[str, Any] | None = None
) -> list[list[StepData]]:
    """Every replica's data of so many steps."""
    where = [dict(dp_rank=rank, dp_size=size) for rank in range(size)]
    loaders = [Loader(cfg, SPEC, tokenizer, seed=5, max_tokens=256, state=state, **place) for place in where]
    try:
        return [[loader.next() for loader in loaders] for _ in range(count)]
    finally:
        for loader in loaders:
            loader.close()


def ids(datas: list[StepData]) -> dict[int, list[int]]:
    """Row of the step -> its samples; the rows of all replicas together are all rows, each once."""
    found = {row: keys for data in datas for (row,), keys in zip(data.rows, data.keys, strict=True)}
    assert sorted(row for data in datas for (row,) in data.rows) == list(range(12))
    assert all(data.state == datas[0].state for data in datas)
    return found


# How many replicas, how many threads, how many steps; then on with the next
CHAINS = {
    "4-2-3-4": [(4, 2, 2), (2, 2, 1), (3, 1, 3), (4, 2, 2)],
    "threads 0-2-1": [(1, 0, 2), (1, 2, 1), (1, 1, 3), (1, 0, 2)],
    "both": [(4, 0, 1), (2, 1, 2), (3, 2, 4), (4, 0, 1)],
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("blended", [False, True])
def test_replicas_and_threads_come_and_go(name: str, blended: bool, measured: Path, tokenizer: Tokenizer) -> None:
    """Every stop is in the middle of a pack (the pool is full), and the steps cross the ends of epochs and cycles."""
    more: dict[str, Any] = {"sources": blend(measured)} if blended else {}
    expected = [ids(datas) for datas in steps(config(measured, **more), tokenizer, 8)]
    found, state = [], None
    for size, threads, count in CHAINS[name]:
        part = steps(config(measured, threads=threads, **more), tokenizer, count, size, state)
        found += [ids(datas) for datas in part]
        state = json.loads(json.dumps(part[-1][0].state))
        assert 4 < len(state["pool"]) < 16, "in the middle of a pack"
        assert {type(n) for n in (state["position"], *state["pool"])} == {int}
    assert found == expected
    flat = [key for step in found for row in step.values() for key in row]
    assert len(flat) == len(set(flat)) > 2 * RECORDS, "none doubled, over the ends of epochs"
    assert sorted([*flat, *state["pool"]]) == list(range(state["position"])), "none lost"


def planner(folders: dict[str, Folder], cfg: DataConfig, tokenizer: Tokenizer) -> Planner:
    encoder = Encoder(
        folders=folders,
        tokenizer=tokenizer,
        template=TEMPLATES["short"],
        spec=SPEC,
        augment=AugmentConfig(),
        seed=5,
    )
    records = {name: len(folder) for name, folder in folders.items()}
    return Planner(
        encoder,
        build_mixture(cfg.sources, records, seed=5, shuffle=cfg.shuffle),
        capacity=cfg.pack.capacity,
        pool=cfg.pack.pool,
        max_tokens=256,
        vision_capacity=cfg.pack.vision_capacity,
    )


def rows(plan: Any) -> list[list[int]]:
    return [[sample.position for sample in row] for row in plan.rows]


@given(
    stops=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    pool=st.sampled_from([1, 7, 64]),
    vision=st.sampled_from([None, 12]),
    blended=st.booleans(),
    shuffle=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_plan_that_is_stopped_anywhere_goes_on(
    measured: Path, tokenizer: Tokenizer, stops: list[int], pool: int, vision: int | None, blended: bool, shuffle: bool
) -> None:
    """Stops after any number of packs, the pool filled: the next hundred packs are the same, sample by sample."""
    cfg = config(measured, shuffle=shuffle, pack=PackConfig(capacity=192, pool=pool, vision_capacity=vision))
    if blended:
        cfg.sources = blend(measured)
    folders = {name: open_folder(source.path) for name, source in cfg.sources.items()}
    whole = rows(planner(folders, cfg, tokenizer).step(sum(stops) + 100))
    found: list[list[int]] = []
    state = None
    for count in [*stops, 100]:
        again = planner(folders, cfg, tokenizer)
        if state is not None:
            again.load(json.loads(state))
        plan = again.step(count)
        found += rows(plan)
        state = json.dumps(plan.state)
    assert found == whole
    drawn = json.loads(state)
    assert sorted([*(i for row in whole for i in row), *drawn["pool"]]) == list(range(drawn["position"]))


def test_planning_reads_nothing_and_a_replica_reads_its_own(
    measured: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_nemo.data.storage.shards import ShardFolder

    read: Counter[int] = Counter()
    real = ShardFolder.record
    monkeypatch.setattr(ShardFolder, "record", lambda self, n: (read.update([n]), real(self, n))[1])
    cfg = config(measured, sources={"instruct": SourceConfig(path=str(measured / "instruct"))})
    assert planner({"instruct": open_folder(cfg.sources["instruct"].path)}, cfg, tokenizer).step(40) and not read
    loader = Loader(config(measured, threads=0), SPEC, tokenizer, seed=5, max_tokens=256, dp_rank=1, dp_size=4)
    data = loader.next()
    loader.close()
    assert len(data.batches) == 3 and data.seen > 50
    # The thread is at most prefetch + 2 steps ahead
    assert 0 < sum(read.values()) <= 2 * 5 * sum(batch.samples for batch in data.batches)
    # What the plan drops is read by the replica that tells its name, by no other
    read.clear()
    cfg = config(measured, sources={"instruct": SourceConfig(path=str(measured / "instruct"))})
    for rank, names in ((0, "0000"), (1, "record ")):
        loader = Loader(cfg, SPEC, tokenizer, seed=5, max_tokens=20, dp_rank=rank, dp_size=4)
        drops = loader.next().planned_drops
        loader.close()
        assert drops and all(drop.key.startswith(names) for drop in drops)


def test_lengths_change_nothing_but_the_speed(measured: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same rows and tensors whether the lengths lie there or the plan makes them."""
    import shutil

    bare = Path(shutil.copytree(measured, tmp_path / "bare"))
    for path in bare.glob("*/*.lengths-*"):
        path.unlink()
    with_lengths = steps(config(measured), tokenizer, 3)
    without = steps(config(bare), tokenizer, 3)
    for (a,), (b,) in zip(with_lengths, without, strict=True):
        assert ids([a]) == ids([b])
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x.tokens, y.tokens) and torch.equal(x.images.patches, y.images.patches)


def test_augmented_samples_resume_to_the_bit(measured: Path, tokenizer: Tokenizer) -> None:
    augment = AugmentConfig(crop_scale=[0.4, 1.0], brightness=0.3, hue=0.1, text_dropout=0.5)
    whole = steps(config(measured, augment=augment), tokenizer, 4)
    first = steps(config(measured, augment=augment, threads=0), tokenizer, 2)
    second = steps(config(measured, augment=augment, threads=1), tokenizer, 2, 2, first[-1][0].state)
    plain = steps(config(measured), tokenizer, 4)
    assert ids(whole[3]) == ids(second[1]) == ids(plain[3]), "the plan does not know of it"
    later = {row: b for data in second[1] for (row,), b in zip(data.rows, data.batches, strict=True)}
    changed = texts = 0
    for (row,), batch, other in zip(whole[3][0].rows, whole[3][0].batches, plain[3][0].batches, strict=True):
        for name in ("tokens", "labels", "positions", "cu_seqlens", "images.patches", "images.slots"):
            assert torch.equal(attrgetter(name)(batch), attrgetter(name)(later[row]))
        changed += not torch.equal(batch.images.patches, other.images.patches)
        texts += batch.used_tokens < other.used_tokens
        assert batch.samples == other.samples
    assert changed > 6 and texts > 6


def test_the_second_budget_and_the_shares(measured: Path, tokenizer: Tokenizer) -> None:
    """At most so many patches a row, nearly as many on every replica, and the step's rows do not depend on it."""
    cfg = config(measured, pack=PackConfig(capacity=192, pool=16, vision_capacity=5 * 4))
    alone, shared = steps(cfg, tokenizer, 4), steps(cfg, tokenizer, 4, 3)
    for (one,), three in zip(alone, shared, strict=True):
        assert ids([one]) == ids(three)
        images = [sum(batch.images.count for batch in data.batches) for data in three]
        assert all(batch.images.count <= 5 for data in three for batch in data.batches)
        assert three[0].vision_balance == pytest.approx(max(images) * 3 / sum(images))
        assert max(images) - min(images) <= 1
        assert {data.delay for data in (one, *three)} == {one.delay} and 0 < one.delay < 200


def test_an_order_of_other_shares_is_refused(measured: Path, tokenizer: Tokenizer) -> None:
    state = steps(config(measured), tokenizer, 1)[0][0].state
    with pytest.raises(UserError, match="shares=weights, this run shares=counts"):
        steps(config(measured, sources=blend(measured)), tokenizer, 1, 1, state)


def test_other_data_of_the_same_number_is_refused(measured: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One caption is another; a record more is left out and one less; tars as they are; but data may move."""
    import shutil

    state = json.loads(json.dumps(steps(config(measured), tokenizer, 1)[0][0].state))
    moved = Path(shutil.copytree(measured, tmp_path / "moved"))
    steps(config(moved), tokenizer, 1, 1, state)
    with pytest.raises(UserError, match=r"order has template=short, this run template=plain; go back"):
        steps(config(moved, template="plain"), tokenizer, 1, 1, state)
    shutil.rmtree(moved / "captions")
    other = make_prepared(tmp_path, captions=60, rows=1)
    shutil.copytree(other / "captions", moved / "captions")
    steps(config(moved), tokenizer, 1, 1, state)
    write_img2dataset(
        tmp_path / "captions", [[{"jpg": picture(i), "txt": b"other words"} for i in range(j, j + 30)] for j in (0, 30)]
    )
    shutil.rmtree(other)
    _prepare_captions(tmp_path)
    found = config(measured)
    found.sources["captions"].path = str(other / "captions")
    assert len(open_folder(str(other / "captions"))) == 60
    with pytest.raises(UserError, match=r"^the data of data\.sources\.captions is not what the run began with[^\n]*$"):
        steps(found, tokenizer, 1, 1, state)


def test_what_tars_and_shards_are(measured: Path, tmp_path: Path) -> None:
    """The identity of a source changes with its contents and with what is left out, not with its place."""
    import shutil

    from tests.data.storage.test_shards import exclude

    cache = Cache(StoreConfig(cache_dir=str(tmp_path / "cache")))
    write_img2dataset(tmp_path / "a", [[{"jpg": picture(i), "txt": b"x"} for i in range(3)]])
    first = open_folder(str(tmp_path / "a"), cache=cache).identity
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_folder(str(tmp_path / "b"), cache=cache).identity == first
    write_img2dataset(tmp_path / "c", [[{"jpg": picture(i), "txt": b"x" * 5000} for i in range(3)]])
    assert open_folder(str(tmp_path / "c"), cache=cache).identity != first
    folder = Path(shutil.copytree(measured / "captions", tmp_path / "d"))
    found = [open_folder(str(folder)).identity]
    for records in ([3], [4]):
        exclude(folder, records)
        found.append(open_folder(str(folder)).identity)
    assert len(set(found)) == 3 and found[0] == open_folder(str(measured / "captions")).identity


def _prepare_captions(folder: Path) -> None:
    from tests.data.raw_data import write_manifest
    from vlm_nemo.data.config import PrepareConfig
    from vlm_nemo.data.prepare.run import prepare

    manifest = write_manifest(folder, ("captions",))
    prepare(PrepareConfig(manifest=str(manifest), out=str(folder / "out"), shard_samples=25, workers=1))


def test_planning_is_quick(measured: Path, tokenizer: Tokenizer) -> None:
    """CPU time a sample, with room for a slow machine; benchmarks/ has the figure."""
    import time

    cfg = config(measured, pack=PackConfig(capacity=4096, pool=64))
    made = planner({name: open_folder(s.path) for name, s in cfg.sources.items()}, cfg, tokenizer)
    made.step(4)
    started = time.thread_time()
    plan = made.step(20)
    samples = sum(len(row) for row in plan.rows)
    assert samples > 500 and (time.thread_time() - started) / samples < 200e-6
