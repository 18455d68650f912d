"""CUDA where there is none: tensors that say "cuda" and hold nothing, and a list of what the host would wait for.

FakeTensorMode runs every operation on devices, types and shapes: mixing devices raises, and so does every look at a
value. torch's own autograd asks CUDA for streams besides; GUARD answers that there is one, and the few functions of
torch.cuda that the step calls are answered here. Nothing is computed, and what a kernel itself refuses nobody sees but
where `_takes` says it. Use it in a process of its own (`run_ranks`): what GUARD says stays said.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.backends import cuda
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <cstring>
static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
extern "C" void pretend_cuda() {
  static Hooks hooks;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  std::memcpy((void*)&at::detail::getCUDAHooks(), (void*)&hooks, sizeof(void*));
}
"""
"""CUDA's device and streams as torch's own stand-in has them, and hooks that say that CUDA is built in: the object that
torch holds gets their table of functions."""
CUDA = torch.device("cuda", 0)


def compile_guard(folder: Path) -> Path:
    """Seconds of a C++ compiler; the result is for as many processes as want it."""
    source, library, torch_at = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(GUARD)
    words = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{torch_at / 'include'}", str(source), "-o"]
    subprocess.run(
        ["g++", *words, str(library), f"-L{torch_at / 'lib'}", "-ltorch_cpu", "-lc10"], check=True, timeout=120
    )
    return library


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What a variable-length kernel was asked."""

    heads: int
    kv_heads: int
    dim: int
    segments: int
    causal: bool
    window: tuple[int, int]
    more_keys: bool
    """Than queries, where segments began on other context ranks"""


@dataclass
class Gpu:
    """What happened on it."""

    waits: Counter[str] = field(default_factory=Counter)
    """What the host waited for, and how often"""
    attention: list[Attention] = field(default_factory=list)
    pinned: dict[int, Any] = field(default_factory=dict)
    """Storages of the host that a copy may read while the host goes on"""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, every tensor that is made is one without memory."""
        with BUSY, MODE, _Watch(self):
            yield

    def look(self, tensor: Tensor) -> Any:
        """Tensor.tolist, the one look that is answered: by ones."""
        self.waits["tolist"] += 1
        with unset_fake_temporarily():
            return torch.ones(tensor.shape).tolist()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def copied(self, to: torch.device, source: Tensor, target: Tensor | None, non_blocking: bool) -> None:
        """Between two devices; of the host's memory the kernel driver must know where it lies."""
        if to.type == source.device.type:
            return
        host = source if to.type == "cuda" else target
        if not non_blocking or host is None or not self.is_pinned(host):
            self.waits[f"copy to {to.type}"] += 1


@contextlib.contextmanager
def pretend(library: Path, parallel: ParallelConfig | None = None, *, world: int = 1, rank: int = 0) -> Iterator[Gpu]:
    """Be `rank` of `world` with a GPU each. Tensors made inside are the host's own until `Gpu.running`."""
    assert not dist.is_initialized() and not torch.cuda.is_available(), "in a process of its own, without a GPU"
    ctypes.CDLL(str(library)).pretend_cuda()
    gpu = Gpu()
    device.on_cuda = lambda: True
    torch.cuda.get_device_capability = lambda *args: (8, 0)
    fake_tensor.init_gpu_context = lambda where: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda index: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *args, **named: torch.get_rng_state()
    torch.cuda.synchronize = lambda *args: gpu.waits.update(["synchronize"])
    torch.cuda.Event = _Event
    if cuda.is_built():  # its choice among the kernels of ordinary attention would ask a driver
        for enable in (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp):
            enable(False)
    FakeTensor.tolist = lambda tensor: gpu.look(tensor)
    dist.all_gather_object = _gather_object
    CudaRNGStatesTracker.fork = lambda tracker, name="": contextlib.nullcontext()
    nn.Module._apply = _apply
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    _kernels()
    with _Moves(gpu):
        groups.lay_out(parallel or ParallelConfig(), seed=0)
        yield gpu
    groups.stop()


class _Mode(FakeTensorMode):
    """As where torch finds no GPU: it never asks a driver."""

    avoid_device_init = True


MODE = _Mode()
"""One for a process: megatron-core keeps tensors on its classes."""
BUSY = threading.Lock()
"""It is not made for two threads at once: one that waits for an event goes on when `Gpu.running` ends."""


@functools.cache
def _kernels() -> torch.library.Library:
    """That there is a kernel of CUDA's for RMSNorm, as in torch's CUDA builds: then autograd keeps what that wants, the
    input and 1/rms. Without, torch takes five operations that keep more. It is never called: what it gives on shapes
    torch knows."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA"):
        library.impl("_fused_rms_norm", lambda *given: None)
    return library


def _apply(module: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
    """Module.to, which wants to put the new memory into the old parameters: these have none to change."""
    for held in module.modules():
        for name, old in held._parameters.items():
            if old is not None:
                new = held._parameters[name] = nn.Parameter(move(old.detach()), old.requires_grad)
                new.__dict__.update({key: value for key, value in vars(old).items() if key not in vars(new)})
        held._buffers.update(
            {name: buffer if buffer is None else move(buffer) for name, buffer in held._buffers.items()}
        )
    return module


def _gather_object(found: list[Any], own: Any, group: Any = None) -> None:
    """Ranks that are not there have what this one has."""
    found[:] = [own] * len(found)


class _Event:
    """torch.cuda.Event"""

    recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "nothing to wait for"
        with BUSY:
            pass


class _Moves(TorchFunctionMode):
    """What moves between host and device: a tensor with numbers becomes one without."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return self.gpu.pin(args[0].clone())
        if func is torch.empty and kwargs.get("pin_memory"):
            return self.gpu.pin(func(*args, **{**kwargs, "pin_memory": False}))
        where = kwargs.get("device", args[1] if func is Tensor.to and len(args) > 1 else None)
        if not isinstance(where, (str, torch.device)) or torch.device(where).type != "cuda":
            return func(*args, **kwargs)
        if func is Tensor.to and not isinstance(args[0], FakeTensor):
            self.gpu.copied(CUDA, args[0], None, kwargs.get("non_blocking", False))
            with MODE:
                return torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device=CUDA)
        with MODE:
            return func(*args, **kwargs)


class _Watch(TorchDispatchMode):
    """Copies that the host waits for, and what attention's kernel is given. Looks at values raise by themselves."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_to_copy":
            to = kwargs.get("device") or args[0].device
            self.gpu.copied(to, args[0], None, kwargs.get("non_blocking", False))
        elif name == "aten::copy_":
            self.gpu.copied(args[0].device, args[1], args[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_unsafe_index"):
            places = [x for x in args[1] if x is not None]
            filled = len(places) == 1 and places[0].dtype is torch.bool  # x[mask] = 0 reads its 0 on the host
            if args[0].is_cuda and not all(x.is_cuda for x in (*places, *([] if filled else args[2:3]))):
                self.gpu.waits["index from the host"] += 1
        elif func.namespace == "c10d":
            if any(isinstance(x, Tensor) and not x.is_cuda for x in tree_leaves(args)):
                self.gpu.waits[f"{name} on the host"] += 1
            if name.endswith("_coalesced_"):  # there is none for shapes
                return FakeWork().boxed()
        elif name == "torch_attn::_varlen_attn":
            self.gpu.attention.append(_takes(*args, **kwargs))
        return func(*args, **kwargs)


def _takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    *more: Any,
) -> Attention:
    """What torch's kernel demands on CUDA (2.11 and 2.13), and its stand-in for shapes does not look at."""
    for x in (q, k, v):
        assert x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.dtype == q.dtype and x.stride(-1) == 1
        assert x.dim() == 3 and x.shape[2] % 8 == 0 and x.shape[2] <= 256, f"heads of {x.shape[2]} channels"
    assert k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    for x in (cu_q, cu_k):
        assert x.is_cuda and x.dtype is torch.int32 and x.dim() == 1 and x.is_contiguous()
    assert len(cu_q) == len(cu_k) > 1 and type(max_q) is type(max_k) is int
    return Attention(
        heads=q.shape[1],
        kv_heads=k.shape[1],
        dim=q.shape[2],
        segments=len(cu_q) - 1,
        causal=causal,
        window=(-1, -1) if window is None else (window[0], window[1]),
        more_keys=len(k) > len(q),
    )
