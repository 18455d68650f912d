"""Where tests have it from."""

from vlm_nemo.runtime.processes import run_ranks

__all__ = ["run_ranks"]
