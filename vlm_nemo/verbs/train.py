"""`vlm-nemo train`: put a run together, part by part, and run it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
import yaml

from vlm_nemo.config import Config
from vlm_nemo.data.config import PackConfig
from vlm_nemo.data.feed import Feed
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.prepare.advice import WARN_BELOW, Fill, advise, pack_fill, percent
from vlm_nemo.data.storage.store import redact
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.build import build_model
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import embedders
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.runtime import device, fusion, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.lock import job_lock
from vlm_nemo.runtime.signals import StopRequest, stop_on_signals
from vlm_nemo.train import checkpoint, optim, tensors
from vlm_nemo.train.metrics import MetricsWriter
from vlm_nemo.train.origin import check_tokenizer, check_vocabulary
from vlm_nemo.train.saver import Saver
from vlm_nemo.train.step import prepare_model
from vlm_nemo.train.trainer import Trainer
from vlm_nemo.train.vision_cache import check_cache, open_store, start_keeping, summary
from vlm_nemo.types import UserError
from vlm_nemo.verbs.common import set_up_logging
from vlm_nemo.verbs.cut import cut

log = logging.getLogger(__name__)

FEW = 512
"""Lengths that other capacities are tried on: some dozens of them in a fifth of a second."""


def train(cfg: Config) -> None:
    """Train as the configuration says, going on from the run's newest checkpoint if there is one."""
    with device.adapter(), stop_on_signals() as request:
        ranks = groups.start(cfg.parallel, cfg.seed)
        set_up_logging(ranks.rank)
        with ExitStack() as opened:
            _train(cfg, ranks, request, opened)
        groups.stop()


def _train(cfg: Config, ranks: Ranks, request: StopRequest, opened: ExitStack) -> None:
    began = time.perf_counter()
    run_dir = Path(cfg.run_dir)

    # 1. What there is to start from and to read, checked before anything is built
    tokenizer = Tokenizer(cfg.data.tokenizer)
    check_vocabulary(tokenizer, cfg.model)
    if unknown := set(cfg.checkpoint.reset) - set(PARTS):
        raise UserError(f"checkpoint.reset names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    opened.enter_context(job_lock(run_dir, "run_dir"))
    if not cfg.checkpoint.resume and checkpoint.newest(run_dir / "checkpoints"):
        raise UserError(
            f"{run_dir} holds checkpoints of an earlier run and checkpoint.resume=false; name another run_dir, "
            "or remove that one"
        )
    check_cache(cfg.data, cfg.optim)
    saved = checkpoint.resumable(run_dir / "checkpoints", ranks) if cfg.checkpoint.resume else None
    start, before = (saved.step, _seconds(run_dir)) if saved else (0, 0.0)
    origin = checkpoint.find(cfg.checkpoint.load) if cfg.checkpoint.load and not saved else None
    if origin:
        checkpoint.check(origin, ranks, ("weights/", "tokenizer/"))
        checkpoint.check_parts(origin, tensors.Reader(origin / "weights"), cfg.checkpoint.reset)
        if "language" not in cfg.checkpoint.reset:
            check_tokenizer(tokenizer, origin, "start the language afresh (checkpoint.reset)")
    if saved:
        check_tokenizer(tokenizer, saved.path, "start a new run (run_dir)")
    store = open_store(cfg.data, ranks)
    # Closed however this ends: an interpreter that exits while the thread decodes aborts instead of saying why
    loader = Feed(
        lambda: Loader(
            cfg.data,
            spec_of(cfg.model),
            tokenizer,
            seed=cfg.seed,
            max_tokens=cfg.model.language.max_positions,
            dp_rank=ranks.data_rank,
            dp_size=ranks.data,
            state=saved.state["loader"] if saved else None,
            features=store,
        ),
        ranks,
    )
    opened.callback(loader.close)
    parallel, stages = cut(cfg, ranks, saved.path if saved else None)
    cfg = replace(cfg, parallel=parallel)
    told = redact(asdict(cfg))  # what is written down or sent away; the run itself needs nothing of it
    config_text = yaml.safe_dump(told, sort_keys=False)
    if ranks.main:
        (run_dir / "config.yaml").write_text(config_text)
    dist.barrier()

    # 2. The model, its weights, its optimizer
    fresh = () if saved else cfg.checkpoint.reset if origin else PARTS
    fusing = opened.enter_context(fusion.compiled(cfg.trainer.compile))
    chunks = build_model(cfg.model, cfg.parallel, cfg.precision, cfg.seed, fresh)
    if source := saved.path if saved else origin:
        checkpoint.load_weights(source, chunks, skip_parts=fresh)
    optim.freeze(chunks, optim.part_rates(cfg.optim))
    model = optim.wrap(chunks, cfg.parallel)
    optimizer = optim.build_optimizer(cfg.optim, cfg.parallel, cfg.precision, model)
    prepare_model(model)
    if saved:
        checkpoint.load_optimizer(saved.path, chunks, optimizer, saved.updates)

    keeper = None
    if cfg.data.vision_cache:
        keeper = start_keeping(store, chunks, cfg.model, cfg.parallel, cfg.precision)
        opened.callback(keeper.close if keeper else lambda: None)

    def write_extras(folder: Path) -> None:
        (folder / "config.yaml").write_text(config_text)
        tokenizer.save(folder / "tokenizer")

    saver = opened.enter_context(
        Saver(
            run_dir / "checkpoints",
            ranks=ranks,
            chunks=chunks,
            optimizer=optimizer,
            write_extras=write_extras,
            keep=cfg.checkpoint.keep,
            asynchronous=cfg.checkpoint.asynchronous,
            frozen=[part for part, rate in optim.part_rates(cfg.optim).items() if rate is None],
            source=source,
            fresh=fresh,
            # In memory: the checkpoint that it comes from may be gone before this run's first one is written
            unused=tensors.read_unused(source / "weights", skip_parts=fresh) if source and ranks.main else [],
        )
    )

    # 3. The loop
    metrics = None
    if ranks.main:
        metrics = MetricsWriter(run_dir, cfg.log, steps=cfg.trainer.steps, start=start, config=told)
        opened.callback(metrics.close)
        if saved:
            metrics.say(f"going on from {saved.path} (step {start})")
        if cfg.checkpoint.asynchronous and not saver.asynchronous:
            log.warning(f"checkpoints are not written in the background: their copies need {saver.room}")
        elif saver.asynchronous and 0 < cfg.checkpoint.every < cfg.trainer.steps:
            metrics.say(f"checkpoints are written in the background, from copies: {saver.room}")
        if loader.loader is not None and loader.loader.first_lengths:
            line, warning = judge_packing(loader.loader.first_lengths, loader.loader.cycle, cfg.data.pack)
            metrics.say(line)
            if warning:
                log.warning(warning)
        for line in stages:
            metrics.say(line)
        if fusing:
            metrics.say("torch.compile makes small kernels during the first steps (trainer.compile)")
    ledger = Ledger.from_json(saved.state["ledger"]) if saved else Ledger()
    ledger.quiet = not ranks.main  # all ranks keep the same ledger; one names the samples
    trainer = Trainer(
        run_dir=run_dir,
        model_cfg=cfg.model,
        data_cfg=cfg.data,
        optim_cfg=cfg.optim,
        trainer_cfg=cfg.trainer,
        checkpoint_cfg=cfg.checkpoint,
        ranks=ranks,
        image_token=tokenizer.image_id,
        chunks=chunks,
        model=model,
        optimizer=optimizer,
        loader=loader,
        ledger=ledger,
        metrics=metrics,
        saver=saver,
        request=request,
        sharing=embedders(cfg.parallel, kept=cfg.data.vision_cache is not None).place,
        keeper=keeper,
        clock=lambda: before + time.perf_counter() - began,
        start=start,
        updates=saved.updates if saved else 0,
    )
    last = trainer.run()
    opened.close()  # the last lines come after the bar's
    if cfg.data.vision_cache:
        line = summary(store, cfg.data.vision_cache)
        if ranks.main:
            print(line)
    if ranks.main:
        print(f"step {last} of {cfg.trainer.steps} done; see {run_dir}/loss.png, {run_dir}/checkpoints/latest")


def judge_packing(lengths: Sequence[int], cycle: int | None, cfg: PackConfig) -> tuple[str, str | None]:
    """What the data holds and how full its rows get, in one line; and a warning if they stay too empty.

    lengths: of the first samples of the order, 0 for one that cannot be used; cycle: samples of the blend.
    """
    usable = [length for length in lengths if 0 < length <= cfg.capacity]
    mean = sum(usable) / len(lengths)
    what = (
        f"{mean:.0f} tokens a sample" if cycle is None else f"a cycle is {cycle:,} samples, {cycle * mean:,.0f} tokens"
    )
    filled = pack_fill(lengths, cfg.capacity, pool=cfg.pool)
    line = f"data: {what}; rows of {cfg.capacity} fill to {percent(filled)} (by the first {len(lengths)} lengths)"
    if filled >= WARN_BELOW or not any(lengths):
        return line, None
    advice = advise([length for length in lengths if length][:FEW], cfg.capacity, pool=cfg.pool)
    return line, f"data.pack.{replace(advice, wanted=Fill(capacity=cfg.capacity, fill=filled))}"


def _seconds(run_dir: Path) -> float:
    """What the run's earlier attempts took, up to their last checkpoint."""
    path = run_dir / "run.json"
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0
