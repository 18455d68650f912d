"""How text is generated. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class InferConfig:
    """Greedy decoding (`vlm_nemo.infer.engine`)."""

    max_new_tokens: int = 128
    """Longest answer, tokens."""
