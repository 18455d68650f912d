"""How text is generated. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class InferConfig:
    """How answers are chosen and how many run at once (`vlm_nemo.infer.engine`)."""

    max_new_tokens: int = 128
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0 = the likeliest token every time; up to 2, the higher the more varied."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Draw only from this many of the likeliest tokens; 0 = all."""
    seed: int | None = None
    """The same seed gives the same answer; null = another one every time. Only with temperature above 0."""
    slots: int = 16
    """Answers decoded at once; each has its own part of the KV cache."""
    prefill_tokens: int = 4096
    """Tokens of new prompts between two tokens of those that run: more fills the cache sooner, fewer stall less."""
    context: int | None = None
    """Tokens of one sequence, prompt and answer together; null = what the model was made for. Fewer need less memory.
    An export's is fixed."""
    runtime: str = field(default="auto", metadata={"choices": ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")})
    """What runs an export; auto = an engine that fits this machine's GPU, else ONNX Runtime."""
