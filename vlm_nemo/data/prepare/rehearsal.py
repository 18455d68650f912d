"""What training will make of these samples: how long one waits for its row, how evenly ranks share the images. Pure.

The loader's own packer and sharing out, on a sample of lengths; nothing is read or decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RANKS = 8
"""Replicas to share out to: the GPUs of a machine."""
ROWS = (1, 4)
"""Rows of a replica in one step."""
MAX_SAMPLES = 8192
"""Samples that are packed."""
STEPS = 8
"""Steps at least, a short list comes again."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """How the packed rows of one capacity are trained on."""

    delay: int
    """The longest that a sample waits for its row: samples that are drawn after it until then (`delay` of metrics)."""
    balance: dict[int, float]
    """{rows a replica and step: vision cost of the busiest of RANKS replicas over the mean, over all steps}; 1 is even,
    as `vision_balance` of metrics."""


def rehearse(sizes: np.ndarray, capacity: int, *, pool: int = 64, seed: int = 0) -> Rehearsal | None:
    """sizes: [n, 2], tokens and vision cost of samples, which come in a random order.

    None if no sample fits. Each step takes as long as its busiest replica, so the balance is a mean of maxima over a
    mean of means.
    """
    from vlm_nemo.data.packing import Packer, share_out  # late: it imports torch

    usable = sizes[(sizes[:, 0] > 0) & (sizes[:, 0] <= capacity)]
    if not len(usable):
        return None
    drawn = usable[np.random.default_rng(seed).permutation(len(usable))[:MAX_SAMPLES]].tolist()
    packer = Packer(capacity, pool)
    wanted = max(STEPS * RANKS * max(ROWS), sum(length for length, _ in drawn) // capacity)
    given, delay, costs = 0, 0, []
    for _ in range(wanted // (RANKS * max(ROWS)) * RANKS * max(ROWS)):
        while not packer.full:
            packer.add(given, drawn[given % len(drawn)][0])
            given += 1
        row = packer.pop()
        delay = max(delay, given - 1 - row[0])  # the oldest comes first
        costs.append(sum(drawn[item % len(drawn)][1] for item in row))
    balance = {}
    for rows in ROWS:
        busiest = 0
        for first in range(0, len(costs), rows * RANKS):
            step = costs[first : first + rows * RANKS]
            busiest += max(sum(step[i] for i in share) for share in share_out(step, RANKS))
        balance[rows] = busiest * RANKS / sum(costs) if sum(costs) else 1.0
    return Rehearsal(delay=delay, balance=balance)
