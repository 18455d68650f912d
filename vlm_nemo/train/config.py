"""How a model is trained. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, warm-up and cosine (`vlm_nemo.train.optim`)."""

    lr: float = 1e-3
    """Peak learning rate; a recipe hands it to the parts it trains: `language_lr: ${optim.lr}`."""
    vision_lr: float | None = None
    """null = frozen: no gradient, no optimizer state."""
    projector_lr: float | None = None
    """The projector's; null = frozen."""
    language_lr: float | None = None
    """The language model's; null = frozen."""
    beta1: float = 0.9
    """Decay of Adam's mean."""
    beta2: float = 0.95
    """Decay of Adam's mean square."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.0
    """Not applied to norms and biases."""
    warmup_steps: int = 0
    """Steps from 0 to the peak learning rate."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of the peak."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop (`vlm_nemo.train.trainer`)."""

    steps: int = 1000
    """Optimizer steps."""
    stop_at: int | None = None
    """Stop after this step with a checkpoint, as a preemption would; the schedule still aims at `steps`."""
    peak_tflops: float | None = None
    """The device's dense peak at this precision, for MFU (H100/H200 SXM bf16: 989.4); null = no MFU."""
    compile: str = field(default="auto", metadata={"choices": ("auto", "always", "never")})
    """torch.compile of what stands between matrix products (`vlm_nemo.runtime.fusion`). auto: on a GPU, where it finds
    a compiler; on a CPU the first step waits half a minute for it, so only with always."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints (`vlm_nemo.train.checkpoint`)."""

    load: str | None = None
    """A step folder to start from: weights only, step 0. On the command line `checkpoint=DIR` is short for it."""
    reset: list[str] = field(default_factory=list)
    """Parts (vision, projector, language) to start afresh instead of loading them."""
    every: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints to keep; 0 = all."""
    resume: bool = True
    """Go on from the newest checkpoint of run_dir if there is one."""
    asynchronous: bool = True
    """Write in the background from a copy in the host's memory, so that a step waits for that copy alone; where the
    memory does not suffice, or with false, the step waits for the disk."""


@dataclass(kw_only=True)
class CheckpointsConfig:
    """What to do with the checkpoints of a folder (`vlm_nemo.train.manifest`)."""

    action: str = field(default="list", metadata={"choices": ("list", "verify", "prune")})
    """list: what there is, files compared by size; verify: every byte read and compared by its hash; prune: remove all
    but those that keep and every say, and never the newest intact one."""
    dir: str = MISSING
    """A run's folder, its folder of checkpoints, or one step folder."""
    keep: int = 2
    """Of prune: how many of the newest to leave, at least 1."""
    every: int = 0
    """Of prune: leave the steps that are multiples of this, too; 0 = none of them for that."""
    yes: bool = False
    """Of prune: remove; without it the table tells what would go."""


@dataclass(kw_only=True)
class LogConfig:
    """What a run tells (`vlm_nemo.train.metrics`)."""

    every: int = 10
    """Steps between lines on a terminal that is not interactive."""
    progress: bool = True
    """Show a progress bar on an interactive terminal."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "vlm_nemo"
    """Project to log to."""
    wandb_mode: str = field(default="offline", metadata={"choices": ("offline", "online", "disabled")})
    """offline writes to run_dir; nothing leaves the machine."""
    tensorboard: bool = False
    """Write TensorBoard events to run_dir."""
    nemo: bool = False
    """Log through NeMo's exp_manager (needs the extra [nemo])."""
