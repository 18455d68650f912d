"""The loop: rows in, steps, metrics, checkpoints, and a clean end whatever ends it."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.feed import Feed
from vlm_nemo.data.ledger import Ledger, recent_samples
from vlm_nemo.data.loader import StepData
from vlm_nemo.data.sample import NothingUsable
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.share import Place
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.signals import StopRequest
from vlm_nemo.train.accounting import Accounting
from vlm_nemo.train.config import CheckpointConfig, OptimConfig, TrainerConfig
from vlm_nemo.train.metrics import MetricsWriter
from vlm_nemo.train.optim import set_rates, settle
from vlm_nemo.train.saver import Saver
from vlm_nemo.train.step import train_step
from vlm_nemo.train.vision_cache import Keeper
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
    loader: Feed
    ledger: Ledger
    metrics: MetricsWriter | None
    """On the main rank only."""
    saver: Saver
    request: StopRequest
    sharing: Place
    """This rank's among those that share out a row's images."""
    keeper: Keeper | None
    """Keeps what a frozen tower makes of images, on the rank that reads."""
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
        books = Accounting(
            ranks=self.ranks,
            ledger=self.ledger,
            model_cfg=self.model_cfg,
            data_cfg=self.data_cfg,
            optim_cfg=self.optim_cfg,
            trainer_cfg=self.trainer_cfg,
        )
        self.ledger.window = recent_samples(self.data_cfg.min_samples_before_stop)
        self._write_progress(step)
        # Ranks see a signal at different moments: only what they agreed on together may end the loop.
        stopping = groups.max_over([self.request.name is not None])[0] > 0
        while step < last and not stopping:
            step += 1
            began = time.perf_counter()
            data = self._next()
            batches = [self._to_model(row) for row in data.batches]
            factor = set_rates(self.optimizer, self.optim_cfg, step, steps)
            result = train_step(self.model, self.optimizer, batches, self.optim_cfg.clip_grad)
            self.updates += result.applied
            device.synchronize()
            recent.append(time.perf_counter() - began)
            metrics, stopping = books.book(
                step,
                data,
                result,
                factor=factor,
                seconds=recent[-1],
                waited=self.loader.wait_s,
                stop=self.request.name is not None or self.saver.failed,
            )
            if self.metrics is not None:
                self.metrics.write(metrics, sum(recent) / len(recent))
            self._judge(books)
            self._tell_saved()
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
        self.saver.wait()  # what went wrong in the background ended the loop, and is raised here, on all ranks
        if step > saved:
            self._save(step, data.state, last=True)
        self._tell_saved()
        self._say(self.ledger.table())
        if stopping:
            name = self.request.name or "a signal to another rank"
            done = f"after step {step} with a checkpoint" if step else "before the first step"
            self._say(f"{name}: stopped {done}; the same command goes on")
        elif step < steps:
            self._say(f"stopped after step {step} (trainer.stop_at) with a checkpoint")
        return step

    def _to_model(self, row: PackedBatch) -> ModelBatch:
        context = (self.ranks.context_rank, self.ranks.context)
        batch = model_batch(
            row,
            self.model_cfg,
            image_token=self.image_token,
            device=device.device(),
            context=context,
            sharing=self.sharing,
        )
        return batch if self.keeper is None else self.keeper.keeping(batch, row)

    def _next(self) -> StepData:
        """The next step's data. Where no usable sample comes any more, that too is on disk and in the log."""
        try:
            return self.loader.next()
        except UserError as error:
            if isinstance(error, NothingUsable):  # the main rank reads, so it has it as it was raised
                self.ledger.add(seen=len(error.drops), used={}, drops=error.drops)
            self._write_ledger()
            self._say(self.ledger.table())
            raise

    def _judge(self, books: Accounting) -> None:
        """Stop the run where too many samples are bad; what was found so far is on disk and in the log by then."""
        try:
            books.judge()
        except UserError:
            self._write_ledger()
            self._say(self.ledger.table())
            raise

    def _save(self, step: int, loader_state: dict[str, Any], last: bool = False) -> None:
        # Seen is what the order gave out, less what still waits for its row
        self.ledger.assert_whole(loader_state["position"] - len(loader_state["pool"]))
        settle(self.model)
        state = {"loader": loader_state, "ledger": self.ledger.to_json(), "updates": self.updates}
        ledger = self._ledger_text()

        def after() -> None:
            self._write_ledger(ledger)
            self._write_progress(step)

        self.saver.save(step, state, wait=last, after=after)
        if self.metrics is not None:
            self.metrics.plot()

    def _tell_saved(self) -> None:
        for line in self.saver.news():
            self._say(line)

    def _write_progress(self, step: int) -> None:
        """run.json: the last step that a checkpoint holds, of how many. Launchers read it: written at the start too, so
        that it never tells of an earlier, shorter run.
        """
        if self.ranks.main:
            progress = {"step": step, "steps": self.trainer_cfg.steps, "seconds": round(self.clock(), 2)}
            draft = self.run_dir / ".run.json.draft"
            draft.write_text(json.dumps(progress) + "\n")
            draft.replace(self.run_dir / "run.json")

    def _ledger_text(self) -> str:
        return json.dumps(self.ledger.to_json(), indent=1) + "\n"

    def _write_ledger(self, text: str | None = None) -> None:
        if self.ranks.main:
            (self.run_dir / "ledger.json").write_text(text or self._ledger_text())

    def _say(self, line: str) -> None:
        if self.metrics is not None:
            self.metrics.say(line)
