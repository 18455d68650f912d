"""torch.compile for small functions that wait for memory, not arithmetic: several passes become one kernel.

Matrix products, attention and torch's own norms are one kernel each already. What stands between them (the turn of
rotary positions, a gate's product, the softmax of the loss) is written as a function of tensors and marked:

    @fused
    def product(gate, up): ...

It runs as written until `compiled` says otherwise. What an autograd.Function keeps for its backward pass stays its own
choice, for only the arithmetic inside of it is compiled: memory that `check` predicts does not depend on it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from vlm_nemo.runtime import device
from vlm_nemo.types import UserError

R = TypeVar("R")
log = logging.getLogger(__name__)
_on = False


def fused(function: Callable[..., R]) -> Callable[..., R]:
    """The function, as one kernel (or a few) inside `compiled`.

    Its tensors of two axes or more are rows of something, as many in all of them; how many may differ from call to
    call, and one kernel serves all. Inside an autograd.Function that is all; elsewhere torch.compile derives the
    gradient and chooses what is kept for it.
    """

    @functools.cache
    def kernel() -> Callable[..., R]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*given: Any) -> R:
        if not _on:
            return function(*given)
        if not torch.is_grad_enabled():  # one kernel, whoever's gradient is wanted elsewhere
            given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in given)
        for x in given:
            if isinstance(x, torch.Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        with device.bare():
            return kernel()(*given)

    return call


@contextlib.contextmanager
def compiled(wanted: str) -> Iterator[bool]:
    """Whether functions marked `fused` are compiled inside; yields what was decided.

    wanted: always | never | auto: on a GPU, where a compiler is found; on a CPU each process would wait for it.
    Raises UserError where it is to be always and nothing can be compiled.
    """
    global _on
    before = _on
    _on = wanted == "always" or (wanted == "auto" and device.on_cuda())
    try:
        if _on and (fault := _tried(device.device())) is not None:
            if wanted == "always":
                raise UserError(
                    f"trainer.compile=always, but torch.compile does not work here ({fault}); install a C++ compiler "
                    "(and Triton for a GPU), or set trainer.compile=auto"
                )
            log.warning("torch.compile does not work here (%s): fused kernels are left out", fault)
            _on = False
        yield _on
    finally:
        _on = before


@functools.cache
def _tried(where: torch.device) -> str | None:
    """What goes wrong with a small function there, in one line; None: it works."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).sigmoid().sum(-1)

    x = torch.ones(3, 5, device=where)
    try:
        found: Any = torch.compile(small)(x)
    except Exception as error:  # a compiler that is missing or broken shows in many types
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None if torch.allclose(found, small(x)) else "its result is wrong"
