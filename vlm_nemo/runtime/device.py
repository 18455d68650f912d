"""The one place that knows CPU or CUDA: the device, the precision, and the adapter that lets megatron-core run on CPU.

megatron-core assumes CUDA: it asks for `torch.cuda.current_device()`, allocates on "cuda", and compares
`tensor.type()` with CUDA names. Where a GPU is present nothing here changes it. Where none is, `adapter()` answers
those few questions for the CPU, so that the same schedules, optimizers and layers run over gloo. It patches names of
megatron-core 0.16.1; `_patch_megatron` fails loudly if one of them is gone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, overrides
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def on_cuda() -> bool:
    return torch.cuda.is_available()


def capability() -> int:
    """The GPU's generation by CUDA's count: 9 = Hopper (H100, H200)."""
    return torch.cuda.get_device_capability()[0]


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else _CPU


def rehearsed(x: Tensor) -> bool:
    """Whether x is a shape without memory that stands for a GPU's tensor (check/world.py)."""
    return isinstance(x, FakeTensor) and not x.is_cuda


def synchronize() -> None:
    """Wait for the device, so that a clock read next is honest."""
    if on_cuda():
        torch.cuda.synchronize()


def exact_fp32() -> None:
    """No TF32: the rotary angles are an fp32 matrix product, and at position 4096 TF32 would turn them by a radian."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def seed_everything(seed: int) -> None:
    """Seed torch and megatron's per-tensor-rank generators. Call after the process groups exist."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


class _CpuForCuda(TorchFunctionMode):
    """Maps what megatron-core asks of CUDA to the CPU: devices, `.cuda()`, `.type()` names, pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = _CUDA_TYPE_NAMES.get(args[0].dtype)
            return name if name is not None else func(*args)
        if kwargs:
            wanted = kwargs.get("device")
            if wanted is not None and torch.device(wanted).type == "cuda":
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


@contextlib.contextmanager
def adapter(pretend: bool = False) -> Iterator[None]:
    """Everything that calls into megatron-core runs inside this; it does nothing where CUDA is available.

    The mapping is thread-local (a TorchFunctionMode): enter it in the thread that trains.
    pretend: on the CPU although there is CUDA, for tensors that have no memory.
    """
    if on_cuda() and not pretend:
        yield
        return
    _patch_megatron()
    with _CpuForCuda():
        yield


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Out of the adapter for a moment: what is compiled should neither see it nor depend on whether it is there."""
    with contextlib.ExitStack() as stack:
        for _ in range(overrides._len_torch_function_stack()):
            stack.enter_context(overrides._pop_mode_temporarily())
        yield


@functools.cache
def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state", "CudaRNGStatesTracker"):
        if not hasattr(mcore_random, name):
            raise RuntimeError(
                f"megatron-core changed: tensor_parallel.random.{name} is gone; pin megatron-core==0.16.1"
            )

    class CpuRngStatesTracker(mcore_random.CudaRNGStatesTracker):
        """The same named generator states, kept for the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            assert seed not in self.seeds_ and name not in self.states_, (name, seed)
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    mcore_random.CudaRNGStatesTracker = CpuRngStatesTracker
    # These three are plain functions of torch.cuda that would raise without a driver.
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.manual_seed = lambda seed: None
