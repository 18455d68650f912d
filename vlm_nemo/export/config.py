"""What `vlm-nemo export` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vlm_nemo.data.config import TEMPLATES
from vlm_nemo.train.config import CheckpointConfig

PRECISIONS = ("fp32", "bf16", "fp16")
ENGINES = ("none", "tensorrt", "tensorrt_rtx")


@dataclass(kw_only=True)
class ExportConfig:
    """A model, from `checkpoint` or `hf`, to ONNX graphs and engines."""

    out: str = MISSING
    """Folder to write; new or empty."""
    hf: str | None = None
    """A LLaVA-1.5 folder of Hugging Face to export instead of a checkpoint."""
    precision: str = field(default="auto", metadata={"choices": ("auto", *PRECISIONS)})
    """Type of weights, activations and cache; auto = bf16 with an engine, fp32 without one: ONNX Runtime on a CPU runs
    fp32 and fp16, not bf16."""
    engine: str = field(default="none", metadata={"choices": ENGINES})
    """Compile the graphs too: tensorrt on the GPU that it is for; tensorrt_rtx for all of engine_sm, without a GPU."""
    engine_sm: list[int] = field(default_factory=list)
    """Compute capabilities to compile for: [89,120] is SM 8.9 and 12.0; [] = that of this machine's GPU."""
    slots: int = 8
    """Sequences that are decoded at once."""
    capacity: int | None = None
    """Tokens of one sequence, prompt and answer: the length of the cache; null = the longest that the model allows."""
    template: str = field(default="auto", metadata={"choices": ("auto", *TEMPLATES)})
    """Of hf=DIR: how a conversation becomes text; auto = the one that the folder's chat template is, else vicuna,
    LLaVA-1.5's. A checkpoint knows its own."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
