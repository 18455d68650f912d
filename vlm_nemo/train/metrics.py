"""What a run tells: one line a step in metrics.jsonl, a progress bar, loss.png, and the loggers that were asked for."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm_nemo.train.config import LogConfig
from vlm_nemo.types import UserError


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, over the whole job."""

    step: int
    loss: float
    """Mean over the supervised tokens of the global batch."""
    balance_loss: float | None
    """How unevenly experts are used, 1 = alike, mean over supervised tokens and sparse layers; not in `loss`, and
    without its weight language.moe.aux_loss; null where there is no such loss."""
    router_z_loss: float | None
    """The same of the router's scores (language.moe.z_loss)."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The highest of the trained parts' rates."""
    supervised_tokens: int
    tokens: int
    """Without padding."""
    samples: int
    tokens_per_s: float
    mfu: float | None
    """Needed FLOPs (flops.py) over what the devices could do at peak; null where the peak is not known."""
    data_wait_s: float
    """The longest that a rank waited for its rows."""
    fill: float
    """Share of the rows' places that hold tokens."""
    vision_balance: float
    """Patches of the replica that has most over the mean; 1 = all carry the same vision work."""
    delay: int
    """The longest that a sample waited for its row: samples drawn after it until then."""
    skipped: int
    """1 where the gradient was not finite and no weight moved."""


class Logger(Protocol):
    """wandb, TensorBoard, NeMo."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes what one process tells for the whole job."""

    def __init__(self, folder: Path, cfg: LogConfig, *, steps: int, start: int, config: dict[str, Any]) -> None:
        """start: the step that the run continues from; lines after it, of an attempt that got further than its last
        checkpoint, are dropped, so that every step stands in the file once."""
        self._path = folder / "metrics.jsonl"
        self._plot = folder / "loss.png"
        self._cfg = cfg
        self._steps = steps
        history = [m for m in read_metrics(self._path) if m["step"] <= start]
        self._losses = [(m["step"], m["loss"]) for m in history if m["loss"] is not None]
        draft = self._path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(m) + "\n" for m in history))
        draft.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        self._loggers = make_loggers(folder, cfg, config)
        self._bar: Progress | None = None
        if cfg.progress and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(folder.name, total=steps, completed=start, loss="-", speed="-")
            self._bar.start()

    def write(self, metrics: StepMetrics, seconds_per_step: float) -> None:
        """seconds_per_step: the recent mean, for the time left."""
        # JSON has no NaN: what is not finite is null
        line = {k: v if v is None or math.isfinite(v) else None for k, v in asdict(metrics).items()}
        self._file.write(json.dumps(line) + "\n")
        if math.isfinite(metrics.loss):
            self._losses.append((metrics.step, metrics.loss))
        for logger in self._loggers:
            numbers = {k: v for k, v in line.items() if v is not None and k != "step"}
            logger.log(numbers, metrics.step)
        if self._bar is not None:
            speed = f"{metrics.tokens_per_s:,.0f}"
            self._bar.update(self._task, completed=metrics.step, loss=f"{metrics.loss:.4f}", speed=speed)
        elif metrics.step % max(1, self._cfg.every) == 0 or metrics.step == self._steps:
            left = int((self._steps - metrics.step) * seconds_per_step)
            self.say(
                f"step {metrics.step}/{self._steps}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
                f"grad {metrics.grad_norm:.2f}  {metrics.tokens_per_s:,.0f} tokens/s  eta {left // 60}:{left % 60:02d}"
            )

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def plot(self) -> None:
        """Draw loss.png from all steps so far."""
        plot_loss(self._losses, self._plot)

    def close(self) -> None:
        """Finish the bar, the plot and the loggers."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self.plot()
        for logger in self._loggers:
            logger.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def plot_loss(points: list[tuple[int, float]], path: Path) -> None:
    """Loss by step, every point faint and a running mean on top."""
    if not points:
        return
    from matplotlib.figure import Figure

    steps, losses = zip(*points, strict=True)
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window))[: len(losses)] / np.minimum(np.arange(len(losses)) + 1, window)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss per supervised token", title=path.parent.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def make_loggers(folder: Path, cfg: LogConfig, config: dict[str, Any]) -> list[Logger]:
    """The external loggers that the config asks for."""
    loggers: list[Logger] = []
    if cfg.wandb:
        loggers.append(_Wandb(folder, cfg, config))
    if cfg.tensorboard:
        loggers.append(_TensorBoard(folder))
    if cfg.nemo:
        loggers.append(_Nemo(folder))
    return loggers


class _Wandb:
    def __init__(self, folder: Path, cfg: LogConfig, config: dict[str, Any]) -> None:
        import wandb

        mode: Any = cfg.wandb_mode
        self._run = wandb.init(project=cfg.wandb_project, name=folder.name, dir=folder, mode=mode, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Nemo:
    """NeMo's exp_manager keeps the experiment's folder and loggers; the loop stays ours."""

    def __init__(self, folder: Path) -> None:
        try:
            import lightning.pytorch as pl
            from nemo.utils.exp_manager import exp_manager
        except ImportError as error:
            raise UserError(f"log.nemo=true needs NeMo ({error}); pip install 'vlm_nemo[nemo]'") from None
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
        settings = {
            "explicit_log_dir": str(folder / "nemo"),
            "create_tensorboard_logger": True,
            "create_checkpoint_callback": False,
        }
        exp_manager(trainer, settings)
        self._loggers = trainer.loggers

    def log(self, values: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(values, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.finalize("success")
