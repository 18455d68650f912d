"""Packing: nothing lost, nothing doubled, rows full, nobody waits for long; and the packed row by hand."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_nemo.data.packing import Packer, fill, pack_batch
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
