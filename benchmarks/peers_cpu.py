"""Samples a CPU second of training a small LLaVA: packed rows here, padded batches through transformers.

ours    the repository's loader, rows of 3584 tokens packed exactly, four of them a step
theirs  transformers' LlavaForConditionalGeneration in a loop as its Trainer runs it: DataLoader, LlavaProcessor,
        batches of 16 padded to their longest, labels masked; once with random batches, once grouped by length

The same data (conversations with the lengths of LLaVA's instruction mix, JPEGs of photographs' size), weights, AdamW,
fp32; the tower frozen, projector and language model trained. First both compute the loss of the same samples. Each
side is a process of its own, one thread of arithmetic; all its CPU time counts, decoding included. One conversation
in sixteen is long, so batches differ: what is compared is all samples over all CPU seconds, not the usual step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llava_twin import PLACEHOLDERS, TINY, Sizes, write_twin
from benchmarks.loops import BATCH, ROWS, Done, ours, theirs
from benchmarks.made import conversations, prepared
from benchmarks.mix import instruct
from benchmarks.paired import compare, ratio_of_sums
from benchmarks.report import RESULTS, parser, save, show
from benchmarks.workers import Here, Worker, fill, serve

PICTURES = ((640, 480), (512, 512), (480, 640), (640, 427))
"""Width and height, as in COCO."""
PEERS = {"padded, random batches": False, "padded, grouped by length": True}
QUICK = 4
"""Samples of a batch with --quick."""
SAME = 1e-4
"""The loss of the same samples may differ by so much: theirs resizes with PIL, ours with PyTorch."""


def make(folder: Path, samples: int, pictures: int, sizes: Sizes) -> Path:
    """Raw files in `folder`, shards, tokenizer and the twin in `folder`/out, which is returned."""
    rng = np.random.Generator(np.random.PCG64(7))
    words, shown = instruct(rng, samples, image_tokens=PLACEHOLDERS)
    texts = conversations(rng, words.tolist())
    without = frozenset(np.flatnonzero(~shown).tolist())
    out = prepared(folder, PICTURES, texts, pictures=pictures, tokenizer_vocab=2000, without=without)
    write_twin(out, out / "tokenizer", sizes)
    return out


def loop_of(name: str, out: Path, attention: str, quick: bool) -> Generator[Done]:
    """The steps of a side."""
    batch, rows = (QUICK, 1) if quick else (BATCH, ROWS)
    if name == "ours":
        return ours(out, rows=rows)
    return theirs(out, grouped=PEERS[name], attention=attention, batch=batch)


def start(name: str, out: Path, attention: str) -> Worker:
    """A side's own process."""
    return Worker("benchmarks.peers_cpu", ["--side", name, "--data", str(out), "--attention", attention])


def same_loss(out: Path, records: list[int]) -> tuple[float, float]:
    """The loss of these samples, ours and theirs, before anything is learned."""
    found: list[Done] = []
    for loop in (
        ours(out, only=records),
        theirs(out, grouped=False, attention="sdpa", batch=len(records), only=records),
    ):
        found.append(next(loop))
        loop.close()
    mine, other = found
    assert mine.samples == other.samples == len(records) and mine.tokens == other.tokens, found
    if abs(mine.loss - other.loss) > SAME:
        sys.exit(f"the losses of the same samples differ: {mine.loss} here, {other.loss} there")
    return mine.loss, other.loss


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if args.side:
        return serve(lambda: loop_of(args.side, args.data, args.attention, False))
    pairs = 1 if args.quick else args.pairs
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = make(Path(folder), *((16, 2, TINY) if args.quick else (2000, 200, Sizes())))
        losses = same_loss(out, list(range(QUICK if args.quick else BATCH)))
        print(f"loss of the same samples: {losses[0]:.6f} ours, {losses[1]:.6f} theirs")
        attention, tried = ("sdpa", {}) if args.quick else _faster(out)
        workers: dict[str, Here | Worker] = {
            name: Here(loop_of(name, out, attention, True)) if args.quick else start(name, out, attention)
            for name in ("ours", *PEERS)
        }
        for worker in workers.values():
            stack.callback(worker.close)
        turns = {}
        for name in PEERS:
            sides = workers["ours"], workers[name]
            count = max(1, pairs // 2) if PEERS[name] else pairs  # batches of like lengths are like one another too
            compare(*(partial(side.steps, 1) for side in sides), count, warm_up=not args.quick)
            turns[name] = [side.seen[-count:] for side in sides]
    for name, (mine, other) in turns.items():
        work = [[(turn["seconds"], turn["samples"]) for turn in side] for side in (mine, other)]
        ratio, low, high = ratio_of_sums(*work)
        rates = [sum(samples for _, samples in side) / sum(seconds for seconds, _ in side) for side in work]
        rows.append(
            {
                "peer": name,
                "ours, samples/s of CPU": round(rates[0], 3),
                "theirs": round(rates[1], 3),
                "times": round(ratio, 2),
                "95 %": f"{low:.2f} to {high:.2f}",
                "fill of ours, %": round(100 * fill(mine), 1),
                "fill of theirs, %": round(100 * fill(other), 1),
            }
        )
    show("a small LLaVA, stage 2, conversations", rows)
    first, second = rows
    save(
        args,
        "peers_cpu",
        claim="Training a small LLaVA on conversations, against transformers' padded loop; the goal is 2 times",
        figure=f"{first['times']} times ({first['95 %']}): {first['ours, samples/s of CPU']} against "
        f"{first['theirs']} samples/s of CPU; {second['times']} times with batches grouped by length",
        rows=rows,
        packages=("torch", "transformers", "megatron-core"),
        losses=losses,
        attention=tried,
        steps=turns,
    )
    target = args.results or (None if args.quick else RESULTS)
    if target is not None:
        draw(rows, target / "peers_cpu.png")


def _faster(out: Path) -> tuple[str, dict[str, float]]:
    """Their faster attention, and CPU seconds a sample of each."""
    tried = {}
    for attention in ("sdpa", "eager"):
        worker = start(next(iter(PEERS)), out, attention)
        worker.steps(1)
        tried[attention] = worker.steps(2)
        worker.close()
    return min(tried, key=lambda name: tried[name]), tried


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a side."""
    from matplotlib.figure import Figure

    names = ["packed (ours)", *(row["peer"] for row in rows)]
    rates = [float(np.mean([row["ours, samples/s of CPU"] for row in rows])), *(row["theirs"] for row in rows)]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.barh(names[::-1], rates[::-1], color=["#777777"] * len(rows) + ["#4477aa"])
    axes.set_xlabel("samples a CPU second, decoding included (more is better)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser("benchmarks.peers_cpu", __doc__)
    found.add_argument("--pairs", type=int, default=40, help="pairs of runs; half as many with grouped batches")
    found.add_argument("--side", help=argparse.SUPPRESS)
    found.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    found.add_argument("--attention", default="sdpa", help=argparse.SUPPRESS)
    return found.parse_args(argv)


if __name__ == "__main__":
    main()
