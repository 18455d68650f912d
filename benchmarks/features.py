"""Samples a CPU second of the demo's stages 1 and 2, with and without data.vision_cache.

with     every image's features come from the disk, hashed and compared: a pass over the images was made before
without  every image is decoded and goes through the tower, which is frozen in both stages

The demo's recipes (the tiny model, 64-pixel images, rows of 1280 tokens) on one process; the losses of both are the
same. Each side is a process of its own; all its CPU time counts.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.loops import Done
from benchmarks.paired import compare
from benchmarks.report import HERE, parser, save, show
from benchmarks.workers import Here, Worker, fill, serve

STEPS = 10
"""Of a turn."""
SIDES = ("with", "without")


def make(folder: Path, images: int) -> Path:
    """The demo's scenes, prepared as the demo does: folder/shards/{captions,instruct,tokenizer}."""
    quiet = subprocess.DEVNULL
    told = [f"out={folder}/raw", f"images={images}", "questions=4", "workers=1"]
    subprocess.run(
        [sys.executable, "data/shapes/prepare.py", *told], cwd=HERE.parent, check=True, stdout=quiet, stderr=quiet
    )
    manifest = (HERE.parent / "data/shapes/manifest.yaml").read_text(encoding="utf-8")
    (folder / "manifest.yaml").write_text(manifest.replace("name: shapes", "name: shapes\nroot: raw"))
    told = [str(folder / "manifest.yaml"), f"out={folder}/shards", "tokenizer_vocab=500", "template=short", "workers=1"]
    subprocess.run(
        [sys.executable, "-m", "vlm_nemo", "prepare", *told], cwd=HERE.parent, check=True, stdout=quiet, stderr=quiet
    )
    return folder / "shards"


def steps(shards: Path, stage: int, cache: Path | None) -> Generator[Done]:
    """A stage's steps; as in vlm_nemo/verbs/train.py, without checkpoints."""
    from vlm_nemo.config import Config, build, compose
    from vlm_nemo.data.loader import Loader
    from vlm_nemo.data.tokenizer import Tokenizer
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.model.layout import spec_of
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim
    from vlm_nemo.train.step import prepare_model, train_step
    from vlm_nemo.train.vision_cache import open_store, start_keeping

    logging.disable()
    source = {1: "captions", 2: "instruct"}[stage]
    words = [f"data.tokenizer={shards}/tokenizer", f"data.sources.{source}.path={shards}/{source}", "data.prefetch=1"]
    cfg = build(compose("train", Config, words, f"shapes/stage{stage}"), Config)
    cfg.data.vision_cache = str(cache) if cache else None
    tokenizer = Tokenizer(cfg.data.tokenizer)
    with device.adapter(), ExitStack() as stack:
        ranks = groups.start(cfg.parallel, cfg.seed)
        stack.callback(groups.stop)
        store, keeper = open_store(cfg.data, ranks), None
        where: dict[str, Any] = dict(seed=cfg.seed, max_tokens=cfg.model.language.max_positions, dp_rank=0, dp_size=1)
        loader = stack.enter_context(closing(Loader(cfg.data, spec_of(cfg.model), tokenizer, features=store, **where)))
        chunks = build_model(cfg.model, cfg.parallel, cfg.precision, cfg.seed)
        optim.freeze(chunks, optim.part_rates(cfg.optim))
        model = optim.wrap(chunks, cfg.parallel)
        optimizer = optim.build_optimizer(cfg.optim, cfg.parallel, cfg.precision, model)
        prepare_model(model)
        if cache:
            keeper = start_keeping(store, chunks, cfg.model, cfg.parallel, cfg.precision)
            assert keeper is not None
            stack.callback(keeper.close)
        number = 0
        while True:
            number += 1
            rows = loader.next().batches
            batches = [
                model_batch(row, cfg.model, image_token=tokenizer.image_id, device=device.device()) for row in rows
            ]
            if keeper is not None:
                batches = [keeper.keeping(batch, row) for batch, row in zip(batches, rows, strict=True)]
            optim.set_rates(optimizer, cfg.optim, number, cfg.trainer.steps)
            result = train_step(model, optimizer, batches, cfg.optim.clip_grad)
            known = sum(row.features is not None for row in rows)  # stands for tokens, all rows for places
            yield Done(
                sum(row.samples for row in rows), known, len(rows), result.loss_sum / max(1.0, result.loss_tokens)
            )


def measure(shards: Path, stage: int, cache: Path, pairs: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of the table, and what it comes from."""
    held, losses = _fill(shards, stage, cache, quick)
    with ExitStack() as stack:
        sides: dict[str, Here | Worker] = {}
        for name in SIDES:
            used = cache if name == "with" else None
            words = ["--side", name, "--data", str(shards), "--stage", str(stage)]
            words += ["--cache", str(cache)] if used else []
            sides[name] = Here(steps(shards, stage, used)) if quick else Worker("benchmarks.features", words)
            stack.callback(sides[name].close)
        turn = 1 if quick else STEPS
        found = compare(lambda: sides["with"].steps(turn), lambda: sides["without"].steps(turn), pairs)
    ratio, low, high = found.ratio()
    mine, other = found.rates(1)
    row = {
        "stage": str(stage),
        "with, samples/s of CPU": round(mine, 1),
        "without": round(other, 1),
        "times": round(ratio, 2),
        "95 %": f"{low:.2f} to {high:.2f}",
        "rows from the cache, %": round(100 * fill(sides["with"].seen), 1),
        "cache, MB": round(held / 1e6, 2),
    }
    return row, {**found._asdict(), "losses": losses}


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if args.side:
        return serve(lambda: steps(args.data, args.stage, args.cache))
    with tempfile.TemporaryDirectory() as folder:
        shards = make(Path(folder), 60 if args.quick else 1000)
        pairs = 1 if args.quick else args.pairs
        found = [measure(shards, stage, Path(folder) / f"cache{stage}", pairs, args.quick) for stage in args.stages]
    rows = [row for row, _ in found]
    show("the demo's stages with data.vision_cache and without", rows)
    save(
        args,
        "features",
        claim="The demo's stages with data.vision_cache, its images seen before, against without",
        figure="; ".join(
            f"stage {row['stage']}: {row['times']} times ({row['95 %']}) the samples/s of CPU" for row in rows
        ),
        rows=rows,
        packages=("torch", "megatron-core"),
        runs=[raw for _, raw in found],
    )


def _fill(shards: Path, stage: int, cache: Path, quick: bool) -> tuple[int, list[float]]:
    """Train until nothing is added any more; the cache's bytes, and the losses of some steps, equal without it."""
    loop = steps(shards, stage, cache)
    losses = [next(loop).loss for _ in range(2)]
    held, same = -1, 0
    while same < (1 if quick else 3) and held < 10**10:
        for _ in range(2 if quick else 20):
            next(loop)
        now = sum(path.stat().st_size for path in cache.glob("*/*.features"))
        held, same = now, same + 1 if now == held else 0
        if quick:
            break
    loop.close()
    plain = steps(shards, stage, None)
    again = [next(plain).loss for _ in range(2)]
    plain.close()
    if again != losses:
        sys.exit(f"the losses with the cache are {losses}, without {again}")
    return held, losses


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser("benchmarks.features", __doc__)
    found.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="default: 1 2")
    found.add_argument("--pairs", type=int, default=20, help="pairs of turns, of each stage")
    for name in ("--side", "--cache", "--data"):
        found.add_argument(name, type=str if name == "--side" else Path, help=argparse.SUPPRESS)
    found.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    return found.parse_args(argv)


if __name__ == "__main__":
    main()
