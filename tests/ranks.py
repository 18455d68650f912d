"""Several gloo processes for a test: `run_ranks(check, 2)`. What a rank raises fails the test, with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import warm
from vlm_nemo.runtime import processes


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 300) -> list[Any]:
    """As `vlm_nemo.runtime.processes.run_ranks`, on processes that start at once (`warm`)."""
    return processes.run_ranks(function, world, *args, timeout=timeout, context=warm.context())
