"""Lengths of conversations as LLaVA's instruction mix has them: one in 16 is text alone and longer."""

from __future__ import annotations

import numpy as np

LONGEST = 2048
"""LLaVA-1.5's model_max_length; no sample is longer."""
_TEMPLATE, _A_WORD = 75, 1.5
"""Tokens of the template and the question, and of a word of made.words with a vocabulary of 2000."""


def instruct(rng: np.random.Generator, samples: int, *, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(words of each answer, whether the sample has an image)."""
    alone = rng.random(samples) < 1 / 16
    short = np.clip(rng.lognormal(np.log(220), 0.75, size=samples), 20, LONGEST - image_tokens - 150)
    long = np.clip(rng.lognormal(np.log(700), 0.8, size=samples), 20, LONGEST - 150)
    tokens = np.where(alone, long, short) - _TEMPLATE
    return np.clip(tokens / _A_WORD, 2, None).astype(int), ~alone
