"""A tiny model that trains at a layout, in the ranks that a test started: steps, a saver, a loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from tests import tiny
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import PARTS, VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import checkpoint, optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.saver import Saver

STEPS, ROWS = 8, 4
ALL = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2, weight_decay=0.1)
STAGE1 = OptimConfig(projector_lr=2e-2)
STAGE2 = OptimConfig(projector_lr=1e-2, language_lr=5e-3)


@dataclass(kw_only=True)
class Trained:
    """One process's part of it. Made inside `device.adapter()`."""

    ranks: Ranks
    chunks: list[VLM]
    model: list[Any]
    optimizer: MegatronOptimizer
    optim_cfg: OptimConfig
    cfg: Any
    done: int = 0

    def steps(self, count: int) -> list[float]:
        """Loss per supervised token of the next steps, as the whole job sees it."""
        losses = []
        for _ in range(count):
            self.done += 1
            mine = tiny.rows(ROWS, seed=100 * self.done)[self.ranks.data_rank :: self.ranks.data]
            place = (self.ranks.context_rank, self.ranks.context)
            batches = [
                model_batch(r, self.cfg, image_token=tiny.IMAGE, device=device.device(), context=place) for r in mine
            ]
            optim.set_rates(self.optimizer, self.optim_cfg, self.done, STEPS)
            result = step.train_step(self.model, self.optimizer, batches, self.optim_cfg.clip_grad)
            speaks = self.ranks.last_stage and self.ranks.tensor_rank == 0
            total, count_all = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
            losses.append(total / count_all)
        return losses

    def saver(self, folder: Path, **more: Any) -> Saver:
        rates = optim.part_rates(self.optim_cfg)
        given: dict[str, Any] = {"frozen": [part for part in PARTS if rates[part] is None], "asynchronous": True} | more
        return Saver(
            folder, ranks=self.ranks, chunks=self.chunks, optimizer=self.optimizer, write_extras=extras, **given
        )

    def save(self, saver: Saver, **more: Any) -> Path:
        optim.settle(self.model)
        return saver.save(self.done, {"updates": self.done}, **more)


def extras(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")


def trained(
    parallel: ParallelConfig,
    source: Path | None = None,
    optim_cfg: OptimConfig = ALL,
    precision: str = "fp32",
    resume: bool = True,
) -> Trained:
    """A fresh model; one that begins with a checkpoint's weights; or one that goes on with its run (resume)."""
    ranks = groups.start(parallel, seed=0)
    cfg = tiny.tiny_model()
    chunks = build_model(cfg, parallel, precision, seed=9 if source else 0)
    if source:
        checkpoint.load_weights(source, chunks)
    optim.freeze(chunks, optim.part_rates(optim_cfg))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(optim_cfg, parallel, precision, model)
    step.prepare_model(model)
    made = Trained(ranks=ranks, chunks=chunks, model=model, optimizer=optimizer, optim_cfg=optim_cfg, cfg=cfg)
    if source and resume:
        saved = checkpoint.read(source)
        checkpoint.load_optimizer(source, chunks, optimizer, saved.updates)
        made.done = saved.step
    return made
