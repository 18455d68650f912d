"""What runs a model for the engine: one small interface, so that torch, ONNX Runtime and TensorRT answer alike.

A backend owns the KV cache: `slots` sequences of up to `capacity` tokens. It knows nothing of requests, sampling or
text; it is handed rows and returns logits. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.types import Images


@dataclass(frozen=True, kw_only=True)
class Row:
    """The next tokens of one sequence: a whole prompt (start 0) or what was just chosen."""

    slot: int
    """Where the sequence's keys and values live, 0 to slots - 1."""
    start: int
    """Tokens of the sequence that are in the cache already; what a slot held behind them counts for nothing."""
    tokens: Sequence[int]
    """At least one; every image as its placeholders."""
    images: Images[NDArray[Any]] | None = None
    """Those whose placeholders are among `tokens`, slots counted from the first of these; None = there are none"""
    positions: NDArray[np.int64] | None = None
    """[3, n]: where M-RoPE sees the tokens; None = at their places in the sequence"""


class Backend(Protocol):
    """A model with its cache. Under several ranks every rank runs the same rows and gets the same logits."""

    slots: int
    """Sequences at once."""
    capacity: int
    """Tokens of one sequence, prompt and answer together."""

    def run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Put the rows' tokens behind what their slots hold; the logits after the last token of each, [rows, V].

        Rows name different slots; lengths may differ. A row's logits do not depend on the other rows (beyond the
        last bits of a sum). Raises ValueError with both counts where placeholders and images disagree.
        """
        ...
