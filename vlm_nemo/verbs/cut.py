"""Which layers of the decoder each pipeline stage gets: looked up in the data, the same on every rank, told once."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import yaml

from vlm_nemo.check.rows import blank_row
from vlm_nemo.config import Config
from vlm_nemo.data.sources import Sources, open_sources
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import embedders
from vlm_nemo.model.stages import Work, costs_of, described, once_kept, resolved, told_of_images, work_of
from vlm_nemo.runtime import exchange, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train.optim import learns
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

ROWS = 16
"""First rows of the run by which stages are balanced: their texts are read, of their images only the sizes."""


def first_work(cfg: Config, sources: Sources) -> Work:
    """What the first rows of the run's data hold. Raises UserError where nothing can be used."""
    planned = sources.planner(cfg.model.language.max_positions).step(ROWS).rows
    rows = [blank_row(sources.encoder, row, cfg.data.pack.capacity) for row in planned]
    return work_of(rows, cfg.model, kept=cfg.data.vision_cache is not None)


def cut(cfg: Config, ranks: Ranks, saved: Path | None) -> tuple[ParallelConfig, list[str]]:
    """The layout with parallel.layers filled in, the same on all ranks of the job, which call it together; and on the
    main rank what there is to say: what each stage does, and how evenly tensor ranks share out a row's images.

    saved: the checkpoint that the run goes on from: its cut is taken again where it is of as many chunks.
    """
    parallel = cfg.parallel
    lines: list[str] = []
    if parallel.pipeline == 1 and not embedders(parallel, kept=False).shared:
        return parallel, lines
    if ranks.main:
        if not parallel.layers and saved is not None:
            parallel = replace(parallel, layers=cut_of_checkpoint(cfg, saved))
        try:
            tokenizer = Tokenizer(cfg.data.tokenizer)
            work = first_work(cfg, open_sources(cfg.data, spec_of(cfg.model), tokenizer, seed=cfg.seed))
        except UserError as error:  # the run's own reader says it too, with its ledger
            log.warning("what pipeline stages and images cost is not known, so nothing is balanced by it: %s", error)
        else:
            parallel = resolved(cfg.model, parallel, learns(cfg.optim), work)
            lines = _told(cfg, parallel, work)
    told = json.dumps(list(parallel.layers)).encode() if ranks.main else None
    return replace(parallel, layers=json.loads(exchange.broadcast_bytes(told, groups.everyone()))), lines


def _told(cfg: Config, parallel: ParallelConfig, work: Work) -> list[str]:
    lines, by = [], f", by the first {ROWS} rows"
    if parallel.pipeline > 1:
        costs = costs_of(cfg.model, parallel, learns(cfg.optim), work)
        lines.append(f"pipeline: {described(costs, parallel.layers, parallel.pipeline)}{by}")
        lines += [f"pipeline: {line}" for line in once_kept(cfg.model, parallel, learns(cfg.optim), work)]
    lines += [f"vision: {line}{'' if work.kept else by}" for line in told_of_images(cfg.model, parallel, work)]
    return lines


def cut_of_checkpoint(cfg: Config, saved: Path) -> list[int]:
    """How the checkpoint's run was cut; empty where that does not fit this layout."""
    was = yaml.safe_load((saved / "config.yaml").read_text()).get("parallel", {}).get("layers", [])
    chunks = cfg.parallel.pipeline * cfg.parallel.virtual
    return was if len(was) == chunks and sum(was) == cfg.model.language.num_layers else []
