"""The words every floor shares: dimension letters, the packed batch, the ignored label, the user's error.

| letter | meaning                                   |
|--------|-------------------------------------------|
| T      | tokens of a packed row (constant)         |
| S      | segments (samples, then padding) of a row |
| N      | images of a row                           |
| P      | embeddings of one image                   |
| D      | width of an embedding                     |

Letters name logical dimensions; sharding never renames them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""A label that takes no part in the loss (the value that PyTorch and Hugging Face use)."""

IMAGE_MARKER = "<image>"
"""Stands for one image in a message's text, as in LLaVA's files."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a layout. Shown as one line on one rank; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One packed row: several samples side by side, padded to T. All tensors live on the CPU.

    T=8, samples of 3 and 4 tokens, one token of padding:
        tokens     [a a a b b b b pad]
        positions  [0 1 2 0 1 2 3 0]      (three equal rows: t, y, x; they differ only under M-RoPE)
        cu_seqlens [0 3 7 8]              (padding is the last segment)
        labels     shifted: labels[t] is the token that the logits at t should predict, or IGNORE_INDEX
    """

    tokens: Tensor
    """[T] int64; an image is P placeholders in a row."""
    labels: Tensor
    """[T] int64"""
    positions: Tensor
    """[3, T] int64"""
    cu_seqlens: Tensor
    """[S+1] int32, from 0 to T"""
    images: Tensor
    """[N, 3, H, W] uint8, in the order of their placeholders"""
    samples: int
    """Samples in the row."""
    used_tokens: int
    """Tokens that are not padding."""

    @property
    def supervised(self) -> int:
        """Number of labels that take part in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())
