"""Packing: nothing lost, nothing doubled, rows full, nobody waits for long; and the packed row by hand."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_nemo.data.packing import LEVELS, Packer, fill, pack_batch, share_out
from vlm_nemo.data.positions import cumulative, rope_positions, segment_positions
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import IGNORE_INDEX


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


def test_several_rows_are_one_batch() -> None:
    """Two rows' samples side by side: every sample's own tokens, positions and labels, the padding of both last."""
    none = torch.empty(0, 3, 2, 2, dtype=torch.uint8)
    samples = [EncodedSample(tokens=[5 + i] * n, labels=[5 + i] * n, images=none) for i, n in enumerate((3, 4, 6))]
    batch = pack_batch(samples, 2 * 8, pad_id=0, image_size=2)
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
    red, blue = torch.full((1, 3, 2, 2), 1, dtype=torch.uint8), torch.full((2, 3, 2, 2), 2, dtype=torch.uint8)
    first = EncodedSample(tokens=[5, 6, 7], labels=[IGNORE_INDEX, 6, 7], images=red)
    second = EncodedSample(tokens=[8, 9, 10, 11], labels=[IGNORE_INDEX, IGNORE_INDEX, 10, 11], images=blue)
    batch = pack_batch([first, second], 8, pad_id=0, image_size=2)
    i = IGNORE_INDEX
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 0]
    assert batch.labels.tolist() == [6, 7, i, i, 10, 11, i, i]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]] * 3
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.samples, batch.used_tokens, batch.supervised) == (2, 7, 4)
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2, 2]


def test_a_full_row_has_no_padding_segment_and_an_empty_one_is_all_padding() -> None:
    sample = EncodedSample(tokens=[5, 6], labels=[5, 6], images=torch.empty(0, 3, 2, 2, dtype=torch.uint8))
    assert pack_batch([sample], 2, pad_id=0, image_size=2).cu_seqlens.tolist() == [0, 2]
    empty = pack_batch([], 4, pad_id=9, image_size=2)
    assert empty.tokens.tolist() == [9] * 4 and empty.supervised == 0 and empty.samples == 0
    assert empty.images.shape == (0, 3, 2, 2) and empty.cu_seqlens.tolist() == [0, 4]
    with pytest.raises(ValueError, match="do not fit"):
        pack_batch([sample, sample], 3, pad_id=0, image_size=2)


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

torch.set_num_threads(4)
images = torch.zeros(2, 3, 336, 336, dtype=torch.uint8)
samples = [EncodedSample(tokens=[1] * 1000, labels=[1] * 1000, images=images) for _ in range(4)]

def work():
    before = len(os.listdir("/proc/self/task"))
    pack_batch(samples, 4096, 0, 336)
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
