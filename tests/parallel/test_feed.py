"""One rank reads for its replica: the others get what they need, the losses are one process's, an error is everybody's.

Micro-batches of several rows are here too: the same losses and gradients as row by row, under every layout.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.data.raw_data import data_config, make_prepared, write_all_lengths
from tests.ranks import run_ranks
from vlm_nemo.data.config import PackConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, dict(tensor=2, sequence=True)),
    "pp2": (2, dict(pipeline=2)),
    "pp2_vpp2": (2, dict(pipeline=2, virtual=2)),
    "dp2": (2, dict()),
    "cp2": (2, dict(context=2)),
    "tp2_pp2": (4, dict(tensor=2, pipeline=2)),
    "pp4": (4, dict(pipeline=4)),
    "pp2_dp2": (4, dict(pipeline=2)),
    "cp2_pp2": (4, dict(context=2, pipeline=2)),
    "cp2_tp2_sp": (4, dict(context=2, tensor=2, sequence=True)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with lengths."""
    prepared = make_prepared(tmp_path_factory.mktemp("raw"))
    write_all_lengths(prepared)
    return prepared


def open_feed(prepared: Path, ranks: Any, micro: int = 1) -> Any:
    from vlm_nemo.data.config import LayoutConfig
    from vlm_nemo.data.feed import Feed
    from vlm_nemo.data.layout.spec import image_spec
    from vlm_nemo.data.loader import Loader
    from vlm_nemo.data.tokenizer import Tokenizer

    cfg = data_config(prepared, global_packs=8, micro_packs=micro, pack=PackConfig(capacity=128, pool=16))
    spec = image_spec(LayoutConfig(aspect="squash"), size=16, patch=8)
    where = dict(dp_rank=ranks.data_rank, dp_size=ranks.data)
    return Feed(lambda: Loader(cfg, spec, Tokenizer(prepared / "tokenizer"), seed=5, max_tokens=128, **where), ranks)


def train(prepared: Path, layout: dict[str, Any], micro: int) -> dict[str, Any]:
    """A few steps; what came of them, and what this rank read and was sent."""
    from vlm_nemo.data.feed import NO_TOKEN
    from vlm_nemo.data.storage.shards import ShardFolder
    from vlm_nemo.data.tokenizer import Tokenizer
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step
    from vlm_nemo.types import IGNORE_INDEX

    reads, images, record = [], ShardFolder.images, ShardFolder.record

    parallel, cfg = ParallelConfig(**layout), tiny.tiny_model()
    cfg.language.vocab_size = 320
    cfg.language.max_positions = 128
    rates = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    image = Tokenizer(prepared / "tokenizer").image_id
    found: dict[str, Any] = {"history": [], "books": []}
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        ShardFolder.images = lambda self, n: (reads.append(n), images(self, n))[1]  # type: ignore[method-assign]
        ShardFolder.record = lambda self, n: (reads.append(n), record(self, n))[1]  # type: ignore[method-assign]
        feed = open_feed(prepared, ranks, micro)
        chunks = build_model(cfg, parallel, "fp32", seed=0)
        optim.freeze(chunks, optim.part_rates(rates))
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
        step.prepare_model(model)
        for number in range(1, STEPS + 1):
            data = feed.next()
            assert feed.wait_s > 0 and len(data.batches) == 8 // ranks.data // micro
            place = (ranks.context_rank, ranks.context)
            batches = [
                model_batch(b, cfg, image_token=image, device=device.device(), context=place) for b in data.batches
            ]
            optim.set_rates(optimizer, rates, number, STEPS)
            result = step.train_step(model, optimizer, batches, rates.clip_grad)
            speaks = ranks.last_stage and ranks.tensor_rank == 0
            total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            found["history"].append((total / count, result.grad_norm))
            found["books"].append((data.seen, data.used, data.planned_drops, data.state, data.delay))
            has_tokens = all((b.tokens != NO_TOKEN).all() for b in data.batches)
            has_images = sum(b.images.patches.numel() for b in data.batches) > 0
            has_labels = all((b.labels != IGNORE_INDEX).any() for b in data.batches)
            reader = feed.loader is not None
            head = ranks.first_stage and ranks.tensor_rank == 0
            assert reader == (head and ranks.context_rank == 0)
            assert (has_tokens, has_images) == (ranks.first_stage, ranks.first_stage)
            assert has_labels == (ranks.last_stage or head)
        feed.close()
        ShardFolder.images, ShardFolder.record = images, record  # type: ignore[method-assign]
        found["reads"] = len(reads)
        found["reader"] = reader
    return found


def train_all(prepared: Path, cases: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    return [train(prepared, layout, micro) for layout, micro in cases]


@pytest.fixture(scope="module")
def one_process(measured: Path) -> dict[str, Any]:
    return run_ranks(train_all, 1, measured, [({}, 1)])[0][0]


def test_several_rows_in_one_forward_are_the_same_step(measured: Path, one_process: dict[str, Any]) -> None:
    for micro, found in zip((2, 4, 8), run_ranks(train_all, 1, measured, [({}, m) for m in (2, 4, 8)])[0], strict=True):
        assert found["books"] == one_process["books"], micro
        for pair, truth in zip(found["history"], one_process["history"], strict=True):
            assert pair == pytest.approx(truth, rel=1e-5), micro


def of(world: int, micro: int) -> list[tuple[dict[str, Any], int]]:
    return [(layout, micro) for size, layout in LAYOUTS.values() if size == world]


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(2, [*of(2, 1), (LAYOUTS["pp2_vpp2"][1], 2)], id="two ranks"),
        pytest.param(4, of(4, 2), id="four ranks"),
        pytest.param(2, of(2, 2), id="two ranks, two rows at once", marks=pytest.mark.slow),
    ],
)
def test_one_rank_reads_and_all_train(
    world: int, cases: list[tuple[dict[str, Any], int]], measured: Path, one_process: dict[str, Any]
) -> None:
    """Rows one by one and two at once; each kind of rank sees both."""
    assert len({loss for loss, _ in one_process["history"]}) == STEPS, "the witness moves"
    all_ranks = run_ranks(train_all, world, measured, cases)
    for number, (layout, micro) in enumerate(cases):
        ranks = [found[number] for found in all_ranks]
        replicas = world // layout.get("tensor", 1) // layout.get("pipeline", 1) // layout.get("context", 1)
        assert sum(found["reader"] for found in ranks) == replicas, layout
        for found in ranks:
            assert (found["reads"] > 0) == found["reader"], layout
            assert found["books"] == one_process["books"], (layout, micro)
            for pair, truth in zip(found["history"], one_process["history"], strict=True):
                assert pair == pytest.approx(truth, rel=1e-5), (layout, micro)


def errors(prepared: Path, layout: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What a rank hears of a reader that fails: where it is built, then in its second step, by user and by bug."""
    from vlm_nemo.data import encode
    from vlm_nemo.data.loader import Loader
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.types import UserError

    heard = []

    def hear(call: Any) -> None:
        started = time.monotonic()
        try:
            call()
        except Exception as error:
            heard.append((type(error).__name__, str(error), time.monotonic() - started))

    with device.adapter():
        ranks = groups.start(ParallelConfig(**layout), seed=0)
        hear(lambda: open_feed(prepared / "nowhere", ranks))
        for failure in (UserError("the shard is gone"), ZeroDivisionError("oops")):
            feed, real, calls = open_feed(prepared, ranks), Loader.next, []

            def failing(self: Any, real: Any = real, calls: Any = calls, failure: Any = failure) -> Any:
                calls.append(1)
                if len(calls) > 1:
                    raise failure
                return real(self)

            Loader.next = failing  # type: ignore[method-assign]
            feed.next()
            for _ in range(2):
                hear(feed.next)
            Loader.next = real  # type: ignore[method-assign]
            feed.close()
        # A decoding thread that dies of something else than a bad sample
        encode.decode_images = lambda *args: 1 / 0  # type: ignore[assignment]
        feed = open_feed(prepared, ranks)
        hear(feed.next)
        feed.close()
    return heard


@pytest.mark.parametrize("layout", [dict(tensor=2), dict(pipeline=2), dict(context=2)], ids=["tp2", "pp2", "cp2"])
def test_an_error_of_the_reader_is_everybodys(measured: Path, layout: dict[str, Any]) -> None:
    reader, other = run_ranks(errors, 2, measured, layout, timeout=120)
    kinds = ["UserError"] * 3
    assert [kind for kind, _, _ in reader] == [*kinds, *["ZeroDivisionError"] * 3]
    assert [kind for kind, _, _ in other] == [*kinds, *["RuntimeError"] * 3]
    assert [words for _, words, _ in reader[:3]] == [words for _, words, _ in other[:3]]
    assert "has no tokenizer.json" in reader[0][1] and reader[1][1] == "the shard is gone"
    assert other[3][1] == "the replica's reader failed: ZeroDivisionError: oops"
    assert "division by zero" in other[-1][1] and all(seconds < 5 for _, _, seconds in reader + other)


def slow_reader(layout: dict[str, Any]) -> list[str]:
    """The first reader takes longer to open its data than a collective waits."""
    import logging
    from datetime import timedelta

    import torch.distributed as dist

    from vlm_nemo.data.feed import Feed
    from vlm_nemo.runtime import device, groups

    groups.TIMEOUT, groups.SAY_SECONDS = timedelta(seconds=2), 1.0
    said: list[str] = []
    groups.log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with device.adapter():
        ranks = groups.start(ParallelConfig(**layout), seed=0)
        Feed(lambda: time.sleep(0 if ranks.rank else 4), ranks)  # type: ignore[arg-type,return-value]
        dist.barrier()
        groups.stop()
    return said


@pytest.mark.parametrize("layout", [dict(tensor=2), dict()], ids=["tp2", "dp2"])
def test_the_first_index_may_take_longer_than_a_collective(layout: dict[str, Any]) -> None:
    reader, other = run_ranks(slow_reader, 2, layout, timeout=120)
    assert not reader and "waiting for 1 ranks that open their data" in other[0]
