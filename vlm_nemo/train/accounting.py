"""What a step did, as the whole job sees it: the metrics, and every sample of it in the ledger."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass

from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.ledger import Ledger
from vlm_nemo.data.loader import StepData
from vlm_nemo.data.sample import Drop
from vlm_nemo.model.batch import looked
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import step_flops
from vlm_nemo.runtime import device, exchange, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train.config import OptimConfig, TrainerConfig
from vlm_nemo.train.metrics import StepMetrics
from vlm_nemo.train.optim import learns, part_rates
from vlm_nemo.train.step import StepResult
from vlm_nemo.types import PackedBatch


@dataclass(kw_only=True)
class Accounting:
    """Books steps; all ranks call it together and come to the same ledger."""

    ranks: Ranks
    ledger: Ledger
    model_cfg: ModelConfig
    data_cfg: DataConfig
    optim_cfg: OptimConfig
    trainer_cfg: TrainerConfig

    def book(
        self,
        step: int,
        data: StepData,
        result: StepResult,
        *,
        factor: float,
        seconds: float,
        waited: float,
        stop: bool,
    ) -> tuple[StepMetrics, bool]:
        """The step's metrics, and whether any rank was asked to stop: one exchange between all ranks.

        factor: of the learning rates; seconds: the step's; waited: for its data; stop: this rank was asked to.
        """
        rates = part_rates(self.optim_cfg)
        # One tensor rank of each stage speaks: the first stage about the data, once for all context ranks; the last
        # about the loss, each context rank about its own tokens.
        tells_data = self.ranks.reader
        tells_loss = self.ranks.last_stage and self.ranks.tensor_rank == 0
        told = [0.0] * 5
        if tells_data:  # the reader: the other ranks of its replica have only parts of its rows
            supervised = sum(batch.supervised for batch in data.batches)
            flops = step_flops(
                self.model_cfg,
                learns(self.optim_cfg),
                lengths=[n for batch in data.batches for n in batch.lengths],
                grids=[grid for batch in data.batches if batch.features is None for grid in _grids(batch)],
                known=[grid for batch in data.batches if batch.features is not None for grid in _grids(batch)],
                supervised=supervised,
                views=[n for batch in data.batches if batch.features is None for n in batch.images.views.tolist()],
                looked=[look for batch in data.batches for look in looked(batch, self.model_cfg)],
            )
            tokens, samples = (sum(getattr(b, name) for b in data.batches) for name in ("used_tokens", "samples"))
            told = [tokens, samples, supervised, flops.total, len(data.local_drops)]
        sums, (waited,) = groups.sum_and_max_over(
            [result.loss_sum * tells_loss, result.loss_tokens * tells_loss, *told, *result.router_losses, stop],
            [waited],
        )
        loss_sum, loss_tokens, tokens, samples, supervised_all, work, lost, balance, z, stops = sums
        self._count(data, int(lost))
        peak = self.trainer_cfg.peak_tflops if device.on_cuda() else None
        metrics = StepMetrics(
            step=step,
            loss=loss_sum / loss_tokens if loss_tokens else math.nan,
            balance_loss=self._by_layer(balance, loss_tokens),
            router_z_loss=self._by_layer(z, loss_tokens),
            grad_norm=result.grad_norm,
            lr=factor * max(rate for rate in rates.values() if rate is not None),
            supervised_tokens=int(supervised_all),
            tokens=int(tokens),
            samples=int(samples),
            tokens_per_s=tokens / seconds,
            mfu=work / (seconds * peak * 1e12 * self.ranks.world) if peak else None,
            data_wait_s=waited,
            fill=tokens / (self.data_cfg.global_packs * self.data_cfg.pack.capacity),
            vision_balance=data.vision_balance,
            delay=data.delay,
            skipped=int(not result.applied),
        )
        return metrics, stops > 0

    def _by_layer(self, total: float, tokens: float) -> float | None:
        """The mean of a router's loss over supervised tokens and sparse layers; where there is one it is never 0."""
        lang = self.model_cfg.language
        return total / (tokens * sum(lang.moe.sparse(n) for n in range(lang.num_layers))) if total else None

    def _count(self, data: StepData, lost: int) -> None:
        """Enter the step into the ledger. Drops found while reading are known to one replica each: share them."""
        drops = data.local_drops
        if lost:
            gathered = exchange.gather_bytes(json.dumps(drops).encode(), groups.data_group())
            drops = [Drop(*drop) for found in gathered for drop in json.loads(found)]
        used = Counter(data.used)
        used.subtract(drop.source for drop in drops)
        self.ledger.add(seen=data.seen, used=used, drops=[*data.planned_drops, *drops])

    def judge(self) -> None:
        """Raises UserError where too many samples are bad, of one source or of all."""
        sources = self.data_cfg.sources.items()
        self.ledger.check(
            self.data_cfg.max_bad_fraction,
            self.data_cfg.min_samples_before_stop,
            own={name: source.max_bad_fraction for name, source in sources if source.max_bad_fraction is not None},
        )


def _grids(batch: PackedBatch) -> list[tuple[int, int]]:
    return [(rows, columns) for rows, columns in batch.images.grids.tolist()]
