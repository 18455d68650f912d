"""The loop: rows in, steps, metrics, checkpoints, and a clean end whatever ends it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import output_tokens
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.signals import StopRequest
from vlm_nemo.train import checkpoint
from vlm_nemo.train.config import CheckpointConfig, OptimConfig, TrainerConfig
from vlm_nemo.train.flops import step_flops
from vlm_nemo.train.metrics import MetricsWriter, StepMetrics
from vlm_nemo.train.optim import part_rates, set_rates
from vlm_nemo.train.step import StepResult, train_step
from vlm_nemo.types import PackedBatch, UserError

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20


@dataclass(kw_only=True)
class Trainer:
    """Everything that a run holds while it runs. Built by `vlm_nemo.verbs.train`."""

    run_dir: Path
    model_cfg: ModelConfig
    data_cfg: DataConfig
    optim_cfg: OptimConfig
    trainer_cfg: TrainerConfig
    checkpoint_cfg: CheckpointConfig
    ranks: Ranks
    image_token: int
    chunks: list[VLM]
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    loader: Loader
    ledger: Ledger
    metrics: MetricsWriter | None
    """On the main rank only."""
    write_extras: Callable[[Path], None]
    """Adds config and tokenizer to a checkpoint; runs on one rank."""
    request: StopRequest
    clock: Callable[[], float]
    """Seconds that the run's attempts took so far."""
    start: int = 0
    """The step that this run continues from."""
    updates: int = 0
    """Optimizer updates so far: steps less the skipped ones."""

    def run(self) -> int:
        """Train to `trainer.steps`, to `trainer.stop_at`, or to the step during which a signal came.

        Returns the last step done. Raises UserError when the data's budget of bad samples is spent, or when the
        gradient is not finite for many steps in a row.
        """
        steps = self.trainer_cfg.steps
        last = min(steps, self.trainer_cfg.stop_at or steps)
        recent: deque[float] = deque(maxlen=20)
        skipped_in_a_row = 0
        step = saved = self.start
        self._write_progress(step)
        # Ranks see a signal at different moments: only what they agreed on together may end the loop.
        stopping = groups.max_over([self.request.name is not None])[0] > 0
        while step < last and not stopping:
            step += 1
            began = time.perf_counter()
            data = self.loader.next()
            batches = [self._to_model(row) for row in data.batches]
            factor = set_rates(self.optimizer, self.optim_cfg, step, steps)
            result = train_step(self.model, self.optimizer, batches, self.optim_cfg.clip_grad)
            self.updates += result.applied
            device.synchronize()
            recent.append(time.perf_counter() - began)
            metrics, stopping = self._summarise(step, data, result, factor, recent[-1])
            if self.metrics is not None:
                self.metrics.write(metrics, sum(recent) / len(recent))
            self._judge()
            skipped_in_a_row = skipped_in_a_row + 1 if metrics.skipped else 0
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"the gradient was not finite for {skipped_in_a_row} steps up to step {step}; lower optim.lr, "
                    "lengthen optim.warmup_steps, or look at the data"
                )
            every = self.checkpoint_cfg.every
            if every and step % every == 0 and step < last and not stopping:
                self._save(step, data.state)
                saved = step
        if step > saved:
            self._save(step, data.state)
        if stopping:
            name = self.request.name or "a signal to another rank"
            done = f"after step {step} with a checkpoint" if step else "before the first step"
            self._say(f"{name}: stopped {done}; the same command goes on")
        elif step < steps:
            self._say(f"stopped after step {step} (trainer.stop_at) with a checkpoint")
        return step

    def _to_model(self, row: PackedBatch) -> ModelBatch:
        vision = self.model_cfg.vision
        return model_batch(
            row,
            image_token=self.image_token,
            tokens_per_image=output_tokens(vision),
            image_size=vision.image_size,
            device=device.device(),
        )

    def _summarise(
        self, step: int, data: StepData, result: StepResult, factor: float, seconds: float
    ) -> tuple[StepMetrics, bool]:
        """The job's view of the step, and whether any rank was asked to stop: one sum over all ranks."""
        rates = part_rates(self.optim_cfg)
        # One tensor rank of each stage speaks: the first stage about the data, the last about the loss.
        tells_data = self.ranks.first_stage and self.ranks.tensor_rank == 0
        tells_loss = self.ranks.last_stage and self.ranks.tensor_rank == 0
        supervised = sum(row.supervised for row in data.batches)
        flops = step_flops(
            self.model_cfg,
            {part: rate is not None for part, rate in rates.items()},
            lengths=[n for row in data.batches for n in sample_lengths(row)],
            images=sum(row.images.shape[0] for row in data.batches),
            supervised=supervised,
        )
        loss_sum, loss_tokens, tokens, samples, supervised_all, work, lost, stop = groups.sum_over(
            [
                result.loss_sum * tells_loss,
                result.loss_tokens * tells_loss,
                sum(row.used_tokens for row in data.batches) * tells_data,
                sum(row.samples for row in data.batches) * tells_data,
                supervised * tells_data,
                flops.total * tells_data,
                len(data.local_drops) * tells_data,
                self.request.name is not None,
            ]
        )
        self._count(data, int(lost))
        waited = groups.max_over([self.loader.wait_s])[0]
        peak = self.trainer_cfg.peak_tflops if device.on_cuda() else None
        metrics = StepMetrics(
            step=step,
            loss=loss_sum / loss_tokens if loss_tokens else math.nan,
            grad_norm=result.grad_norm,
            lr=factor * max(rate for rate in rates.values() if rate is not None),
            supervised_tokens=int(supervised_all),
            tokens=int(tokens),
            samples=int(samples),
            tokens_per_s=tokens / seconds,
            mfu=work / (seconds * peak * 1e12 * self.ranks.world) if peak else None,
            data_wait_s=waited,
            skipped=int(not result.applied),
        )
        return metrics, stop > 0

    def _count(self, data: StepData, lost: int) -> None:
        """Enter the step into the ledger. Drops found while decoding are known to one data rank each: share them."""
        drops = list(data.local_drops)
        if lost:
            gathered: list[Any] = [None] * self.ranks.data
            dist.all_gather_object(gathered, drops, group=groups.data_group())
            drops = [drop for found in gathered for drop in found]
        self.ledger.add(seen=data.seen, used=data.used - len(drops), drops=[*data.planned_drops, *drops])

    def _judge(self) -> None:
        """Stop the run where too many samples are bad; what was found so far is on disk by then."""
        try:
            self.ledger.check(self.data_cfg.max_bad_fraction, self.data_cfg.min_samples_before_stop)
        except UserError:
            self._write_ledger()
            raise

    def _save(self, step: int, loader_state: dict[str, Any]) -> None:
        state = {"loader": loader_state, "ledger": self.ledger.to_json(), "updates": self.updates}
        checkpoint.save(
            self.run_dir / "checkpoints",
            step,
            ranks=self.ranks,
            chunks=self.chunks,
            optimizer=self.optimizer,
            state=state,
            write_extras=self.write_extras,
            keep=self.checkpoint_cfg.keep,
        )
        self._write_ledger()
        self._write_progress(step)
        if self.metrics is not None:
            self.metrics.plot()

    def _write_progress(self, step: int) -> None:
        """run.json: the last step that a checkpoint holds, of how many. Launchers read it: written at the start too, so
        that it never tells of an earlier, shorter run.
        """
        if self.ranks.main:
            progress = {"step": step, "steps": self.trainer_cfg.steps, "seconds": round(self.clock(), 2)}
            draft = self.run_dir / ".run.json.draft"
            draft.write_text(json.dumps(progress) + "\n")
            draft.replace(self.run_dir / "run.json")

    def _write_ledger(self) -> None:
        if self.ranks.main:
            (self.run_dir / "ledger.json").write_text(json.dumps(self.ledger.to_json(), indent=1) + "\n")

    def _say(self, line: str) -> None:
        if self.metrics is not None:
            self.metrics.say(line)


def sample_lengths(row: PackedBatch) -> list[int]:
    """Tokens of each sample of a row, padding left out."""
    cu = [c for c in row.cu_seqlens.tolist() if c <= row.used_tokens]
    return [b - a for a, b in zip(cu, cu[1:], strict=False)]
