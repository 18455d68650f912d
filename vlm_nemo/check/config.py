"""What the rehearsal looks at. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("plan", "parity", "leaks", "data", "dry")


@dataclass(kw_only=True)
class CheckConfig:
    """`vlm-nemo check` (`vlm_nemo.check.report`)."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"choices": PARTS})
    """Which parts to run: plan (memory, FLOPs, pipeline, communication), parity (layouts against one process), leaks
    (between samples and images), data (what the sources hold), dry (one real step of a tiny twin)."""
    out: str = "${run_dir}/check"
    """Folder for report.html and report.json."""
    samples: int = 2000
    """Samples of the run's order that are looked at, from its start, where there is data."""
    world: int = 8
    """Ranks that the plan is made for."""
    memory_gib: float = 80.0
    """What a rank's device holds (H100: 80, H200: 141)."""
    reserve_gib: float = 6.0
    """What CUDA, NCCL and the allocator's gaps take of it."""
    image: list[int] = field(default_factory=lambda: [1024, 768])
    """Width and height of the image that every sample is taken to have, pixels, where there is no data to look at."""
    text: int = 256
    """Tokens of text that every sample is taken to have, where there is no data to look at."""
