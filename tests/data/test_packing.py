"""Packing: nothing lost, nothing doubled, rows full, nobody waits for long; and the packed row by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlm_nemo.data.packing import LEVELS, Packer, fill, pack_batch, share_out
from vlm_nemo.data.positions import cumulative, grid_positions, rope_positions, segment_positions
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import IGNORE_INDEX, Images


def pack_all(lengths: list[int], capacity: int, pool: int) -> tuple[list[list[int]], list[int]]:
    """All rows, and for each item how many rows were formed while it waited."""
    packer = Packer(capacity, pool)
    rows, entered, waited = [], {}, [0] * len(lengths)
    todo = list(enumerate(lengths))[::-1]
    while todo or len(packer):
        while todo and not packer.full:
            item, length = todo.pop()
            packer.add(item, length)
            entered[item] = len(rows)
        row = packer.pop()
        for item in row:
            waited[item] = len(rows) - entered[item]
        rows.append(row)
    return rows, waited


@given(st.lists(st.integers(1, 50), max_size=120), st.integers(1, 20))
def test_every_item_is_placed_once_in_time_and_fits(lengths: list[int], pool: int) -> None:
    rows, waited = pack_all(lengths, 50, pool)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert all(rows_waited < pool for rows_waited in waited)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(0, 60))
def test_fill_finds_the_best_subset(lengths: list[int], room: int) -> None:
    taken = fill(lengths, room)
    assert taken == sorted(set(taken))
    sums = {0}
    for n in lengths:
        sums |= {s + n for s in sums}
    assert sum(lengths[i] for i in taken) == max(s for s in sums if s <= room)


def best_within(lengths: list[int], room: int, costs: list[int], cost_room: int) -> int:
    """Largest sum of a subset within both budgets, by looking at every pair (sum, cost) that can be reached."""
    pairs = {(0, 0)}
    for n, cost in zip(lengths, costs, strict=True):
        pairs |= {(s + n, c + cost) for s, c in pairs if s + n <= room and c + cost <= cost_room}
    return max(s for s, _ in pairs)


ITEMS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=11)


@given(ITEMS, st.integers(0, 80), st.integers(0, LEVELS), st.sampled_from([1, 3, 576]))
def test_fill_finds_the_best_subset_within_both_budgets(
    items: list[tuple[int, int]], room: int, cost_room: int, unit: int
) -> None:
    """Exact while the budget is a small multiple of the costs' unit, as with images of one size."""
    lengths, costs = [n for n, _ in items], [c * unit for _, c in items]
    taken = fill(lengths, room, costs, cost_room * unit + unit - 1)
    assert taken == sorted(set(taken))
    assert sum(costs[i] for i in taken) <= cost_room * unit + unit - 1
    assert sum(lengths[i] for i in taken) == best_within(lengths, room, costs, cost_room * unit)


@given(ITEMS, st.integers(0, 80), st.integers(40, 4000), st.integers(1, 400))
def test_rounded_costs_never_break_a_budget(items: list[tuple[int, int]], room: int, cost_room: int, unit: int) -> None:
    """Costs of any size: never over either budget, never better than the best, never worse than rounding allows."""
    lengths, costs = [n for n, _ in items], [c * unit + c % 3 for _, c in items]
    taken = fill(lengths, room, costs, cost_room)
    total = sum(lengths[i] for i in taken)
    assert total <= room and sum(costs[i] for i in taken) <= cost_room
    assert total <= best_within(lengths, room, costs, cost_room)
    rounded = [-(-c * LEVELS // cost_room) for c in costs]
    assert total >= best_within(lengths, room, rounded, LEVELS)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7)), max_size=100), st.integers(1, 16))
def test_rows_keep_both_budgets_and_nobody_waits_longer(items: list[tuple[int, int]], pool: int) -> None:
    packer, rows, todo = Packer(50, pool, vision_capacity=7), [], list(enumerate(items))[::-1]
    while todo or len(packer):
        while todo and not packer.full:
            number, (length, cost) = todo.pop()
            packer.add(number, length, cost)
        oldest = packer.items[0]
        rows.append(packer.pop())
        assert rows[-1][0] == oldest, "the oldest always goes"
    assert sorted(i for row in rows for i in row) == list(range(len(items)))
    for row in rows:
        assert sum(items[i][0] for i in row) <= 50 and sum(items[i][1] for i in row) <= 7


def test_two_budgets_still_fill_rows_of_a_mix() -> None:
    """Half text, half with one to four images of 576 patches, at most six images a row: 5.3 on average."""
    rng = random.Random(1)
    images = [rng.choice([0, 0, 0, 1, 1, 1, 2, 4]) for _ in range(4000)]
    lengths = [min(4096, 576 * n + int(rng.lognormvariate(5.0, 0.8)) + 10) for n in images]
    packer, rows, todo = Packer(4096, 64, vision_capacity=6 * 576), [], list(range(4000))[::-1]
    while todo:
        while todo and not packer.full:
            packer.add(todo[-1], lengths[todo[-1]], 576 * images[todo[-1]])
            todo.pop()
        rows.append(packer.pop())
    assert all(sum(images[i] for i in row) <= 6 for row in rows)
    assert sum(lengths[i] for row in rows for i in row) / (4096 * len(rows)) > 0.99


@given(st.integers(1, 8), st.integers(1, 6), st.data())
def test_rows_are_shared_out_evenly(parts: int, size: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=parts * size, max_size=parts * size))
    groups = share_out(costs, parts)
    assert [len(group) for group in groups] == [size] * parts and all(group == sorted(group) for group in groups)
    assert sorted(i for group in groups for i in group) == list(range(parts * size))
    loads = [sum(costs[i] for i in group) for group in groups]
    assert max(loads) - min(loads) <= max(costs), "off by one row at most"


def test_sharing_out_by_hand() -> None:
    assert share_out([9, 1, 5, 5], 2) == [[0, 1], [2, 3]]
    assert share_out([3, 3, 3, 3], 2) == [[0, 2], [1, 3]]
    rng = random.Random(0)
    costs = [576 * rng.randint(0, 7) for _ in range(64)]
    loads = [sum(costs[i] for i in group) for group in share_out(costs, 8)]
    turns = [sum(costs[p::8]) for p in range(8)]
    assert max(loads) * 8 / sum(loads) < 1.05 < max(turns) * 8 / sum(turns)


def pictures(
    colours: Sequence[int] = (), slots: Sequence[int] = (), sources: Sequence[int] = ()
) -> Images[NDArray[Any]]:
    """Images of one patch of 2 x 2 pixels each, in one colour, that give two embeddings."""
    return Images(
        patches=np.array([[colour] * 12 for colour in colours], dtype=np.uint8).reshape(-1, 12),
        grids=np.ones((len(colours), 2), dtype=np.int64),
        views=np.ones(len(colours), dtype=np.int64),
        embeddings=np.full(len(colours), 2),
        slots=np.array(slots, dtype=np.int64),
        sources=np.array(sources, dtype=np.int64),
    )


def test_positions_of_a_sample_stay_its_own() -> None:
    own = np.array([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    assert (grid_positions(6, [(1, 2, 2)]) == own).all()
    assert grid_positions(7, [(0, 1, 3), (4, 2, 1)]).tolist() == [
        [0, 0, 0, 3, 4, 4, 6],
        [0, 0, 0, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 4, 6],
    ]
    text = EncodedSample(tokens=[5, 6], labels=[5, 6], images=pictures())
    image = EncodedSample(tokens=[7] * 6, labels=[7] * 6, images=pictures(), positions=own)
    batch = pack_batch([text, image, text], 12, pad_id=0, patch=2)
    for axis in range(3):
        assert batch.positions[axis].tolist() == [0, 1, *own[axis].tolist(), 0, 1, 0, 1]


def test_several_rows_are_one_batch() -> None:
    """Two rows' samples side by side: every sample's own tokens, positions and labels, the padding of both last."""
    samples = [
        EncodedSample(tokens=[5 + i] * n, labels=[5 + i] * n, images=pictures()) for i, n in enumerate((3, 4, 6))
    ]
    batch = pack_batch(samples, 2 * 8, pad_id=0, patch=2)
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 13, 16] and batch.used_tokens == 13 and batch.samples == 3
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_a_mix_of_instructions_fills_its_rows() -> None:
    rng = random.Random(0)

    def length() -> int:
        if rng.random() < 0.06:
            return rng.randint(30, 1500)  # text only
        return 576 + int(min(2500.0, rng.lognormvariate(5.3, 0.7)))

    lengths = [length() for _ in range(20_000)]
    rows, waited = pack_all(lengths, 4096, 64)
    whole = rows[:-64]  # the last rows are what is left when nothing more comes
    used = sum(lengths[i] for row in whole for i in row)
    assert used / (4096 * len(whole)) >= 0.999
    assert max(waited) < 64


def test_items_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        Packer(8, 4).add(0, 9)
    with pytest.raises(ValueError, match="costs 6 patches, a row may cost 5"):
        Packer(8, 4, vision_capacity=5).add(0, 8, 6)


def test_a_row_by_hand() -> None:
    red, blue = pictures([1], slots=[1, 2], sources=[0, -1]), pictures([2, 3], slots=[0, 1, 3], sources=[0, -1, 1])
    first = EncodedSample(tokens=[5, 6, 7], labels=[IGNORE_INDEX, 6, 7], images=red)
    second = EncodedSample(tokens=[8, 9, 10, 11], labels=[IGNORE_INDEX, IGNORE_INDEX, 10, 11], images=blue)
    batch = pack_batch([first, second], 8, pad_id=0, patch=2)
    i = IGNORE_INDEX
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 0]
    assert batch.labels.tolist() == [6, 7, i, i, 10, 11, i, i]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]] * 3
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.samples, batch.used_tokens, batch.supervised) == (2, 7, 4)
    assert batch.images.patches[:, 0].tolist() == [1, 2, 3] and batch.images.grids.tolist() == [[1, 1]] * 3
    assert batch.images.views.tolist() == [1, 1, 1] and batch.images.embeddings.tolist() == [2, 2, 2]
    assert batch.images.slots.tolist() == [1, 2, 3, 4, 6]
    assert batch.images.sources.tolist() == [0, -1, 2, -1, 3], "what the first image leaves unused is counted"


def test_a_full_row_has_no_padding_segment_and_an_empty_one_is_all_padding() -> None:
    sample = EncodedSample(tokens=[5, 6], labels=[5, 6], images=pictures())
    assert pack_batch([sample], 2, pad_id=0, patch=2).cu_seqlens.tolist() == [0, 2]
    empty = pack_batch([], 4, pad_id=9, patch=2)
    assert empty.tokens.tolist() == [9] * 4 and empty.supervised == 0 and empty.samples == 0
    assert empty.images.count == 0 and empty.images.patches.shape == (0, 12) and empty.cu_seqlens.tolist() == [0, 4]
    with pytest.raises(ValueError, match="do not fit"):
        pack_batch([sample, sample], 3, pad_id=0, patch=2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(deadline=None)
def test_positions_restart_in_every_segment(lengths: list[int]) -> None:
    expected = [t for n in lengths for t in range(n)]
    assert segment_positions(lengths).tolist() == expected
    assert rope_positions(lengths).tolist() == [expected] * 3
    assert cumulative(lengths).tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


_TEAM = """
import os, threading
import numpy as np, torch
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import Images

torch.set_num_threads(4)
none = np.zeros(0, dtype=np.int64)
images = Images(
    patches=np.zeros((2 * 576, 588), np.uint8), grids=np.full((2, 2), 24), views=np.ones(2, int),
    embeddings=np.full(2, 576), slots=np.arange(1152), sources=np.arange(1152),
)
samples = [EncodedSample(tokens=[1] * 1000, labels=[1] * 1000, images=images) for _ in range(4)]

def work():
    before = len(os.listdir("/proc/self/task"))
    pack_batch(samples, 4096, 0, 14)
    torch_resize(np.zeros((480, 640, 3), np.uint8), 336, 448)
    print(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_no_openmp_team_is_started() -> None:
    # A data thread with a team of its own burns CPU: the team spins after every operation
    child = subprocess.run([sys.executable, "-c", _TEAM], capture_output=True, text=True, check=False)
    assert child.stdout.strip() == "0", child.stdout + child.stderr[-1000:]
