"""What is asked of a trained model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class EvaluateConfig:
    """Exact match on held-out questions (`vlm_nemo.evaluate.vqa`)."""

    data: str | None = None
    """Folder of shards, as prepare writes it; each record's last assistant turn is the truth, `kind` its group."""
    limit: int | None = None
    """Questions a kind; null = all."""
    max_new_tokens: int = 32
    """Longest answer, tokens."""
    swap: bool = True
    """Ask everything again with each image swapped for another one's."""
    slots: int = 64
    """Questions that are answered at once."""
    hf: str | None = None
    """Evaluate this Hugging Face folder instead of checkpoint.load."""
    export: str | None = None
    """Evaluate this export bundle instead of checkpoint.load."""
    gallery: int = 24
    """Unseen images in gallery.html and the contact sheet; 0 = none."""
