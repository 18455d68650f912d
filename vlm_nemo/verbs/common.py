"""What several verbs do the same way."""

from __future__ import annotations

import logging
import sys


def set_up_logging(rank: int) -> None:
    """Warnings and errors to stderr, with the rank where there are several."""
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{prefix}%(levelname)s: %(message)s")
