"""An export through engines of TensorRT or TensorRT-RTX, whose Python interfaces are the same. No torch here."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.bundle import Bundle, Engines
from vlm_nemo.infer.cuda_memory import Cuda
from vlm_nemo.infer.static_cache import StaticCacheBackend
from vlm_nemo.types import UserError

PREFILL, DECODE = 0, 1
"""The language engine's profiles, in the order in which they were built."""


def choose_engines(bundle: Bundle, backend: str, version: str, capability: int) -> Engines:
    """The engines of a bundle that this backend, of this version, runs on a device of this compute capability.

    Raises UserError that lists what there is.
    """
    there = bundle.engines()
    for engines in there:
        if (engines.backend, engines.version, engines.compute_capability) == (backend, version, capability):
            if engines.precision == bundle.precision and engines.capacity == bundle.capacity:
                return engines
    found = ", ".join(engines.folder.name for engines in there) or "no engines"
    raise UserError(
        f"{bundle.folder} has {found}, and none for {backend} {version} on sm{capability}: export again with "
        f"engine={backend}" + (f" engine_sm=[{capability}]" if backend == "tensorrt_rtx" else "")
    )


class TensorRTBackend(StaticCacheBackend):
    """The engines of a bundle, the cache written in place on the device."""

    def __init__(self, bundle: Bundle, backend: str, *, slots: int | None = None, device: int = 0) -> None:
        """backend: tensorrt | tensorrt_rtx. slots: None = as many as the engines take, which is also the most.

        Raises UserError where there is no GPU, no such package, or no engine for this GPU and this version.
        """
        cuda = Cuda(device)
        try:
            trt = importlib.import_module(backend)
        except (ImportError, OSError) as error:
            raise UserError(f"the package {backend} does not import ({error}); install it to run its engines") from None
        engines = choose_engines(bundle, backend, trt.__version__, cuda.capability)
        slots = slots or engines.slots
        if slots > engines.slots:
            raise UserError(f"slots={slots}, but {engines.folder.name} was compiled for {engines.slots}; export again")
        super().__init__(bundle, slots)
        self._cuda = cuda
        self._image_batch = engines.image_batch
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._vision = _Engine(self._load(engines, "vision"), cuda, profiles=1)
        self._language = _Engine(self._load(engines, "llm"), cuda, profiles=2)
        size, width = bundle.storage.itemsize, bundle.hidden_size
        # A step has a whole prompt's tokens, or one of every slot
        most = max(bundle.capacity, slots)
        self._buffers = {
            "pixels": cuda.zeros(self._image_batch * 3 * bundle.image.size**2),
            "image_embeds": cuda.zeros(self._image_batch * bundle.image_tokens * width * size),
            "inputs_embeds": cuda.zeros(most * width * size),
            "position_ids": cuda.zeros(most * 8),
            "write_indices": cuda.zeros(slots * 8),
            "last_index": cuda.zeros(slots * 8),
            "logits": cuda.zeros(slots * bundle.vocab_size * 4),
        }
        self._slot_bytes = math.prod(bundle.cache_shape(1)) * size
        # Zeros: a masked place has weight zero, and zero times a NaN of fresh memory would be NaN
        self._cache = [cuda.zeros(slots * self._slot_bytes) for _ in range(2 * bundle.layers)]

    def _load(self, engines: Engines, name: str) -> Any:
        path = engines.folder / f"{name}.engine"
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise UserError(f"{path} does not load on this GPU; export again with engine={engines.backend}")
        return engine

    def embed_images(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        bundle = self.bundle
        out = np.empty((len(images), bundle.image_tokens, bundle.hidden_size), dtype=bundle.storage)
        for i in range(0, len(images), self._image_batch):
            part = np.ascontiguousarray(images[i : i + self._image_batch])
            self._cuda.send(part, self._buffers["pixels"])
            self._vision.run(0, {"pixels": part.shape}, {n: self._buffers[n] for n in ("pixels", "image_embeds")})
            self._cuda.fetch(self._buffers["image_embeds"], out[i : i + len(part)])
        return out

    def step(
        self,
        first: int,
        embeds: NDArray[Any],
        positions: NDArray[np.int64],
        write: NDArray[np.int64],
        last: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        count, length = embeds.shape[:2]
        if count > 1 and length > 1:
            raise ValueError(f"the engines take one prompt or one token of each, not {count} x {length} tokens")
        given = {"inputs_embeds": embeds, "position_ids": positions, "write_indices": write, "last_index": last}
        shapes = {name: values.shape for name, values in given.items()}
        for name, values in given.items():
            self._cuda.send(np.ascontiguousarray(values), self._buffers[name])
        addresses = {name: self._buffers[name] for name in (*given, "logits")}
        cache_shape = self.bundle.cache_shape(count)
        for i, base in enumerate(self._cache):
            name = f"{('key', 'value')[i % 2]}_{i // 2}"
            shapes["past_" + name] = cache_shape
            # One address for both: the engine updates the cache where it lies
            addresses["past_" + name] = addresses["present_" + name] = base + first * self._slot_bytes
        self._language.run(DECODE if length == 1 else PREFILL, shapes, addresses)
        logits = np.empty((count, self.bundle.vocab_size), dtype=np.float32)
        self._cuda.fetch(self._buffers["logits"], logits)
        return logits

    def close(self) -> None:
        """Give the device's memory back."""
        self._cuda.close()


class _Engine:
    """A loaded engine with an execution context a profile: switching the profile of one context would stall."""

    def __init__(self, engine: Any, cuda: Cuda, profiles: int) -> None:
        self._engine = engine  # contexts do not keep it alive
        self._stream = int(cuda.stream)
        self._contexts = []
        for profile in range(profiles):
            context = engine.create_execution_context()
            if context is None:
                raise UserError("the GPU has too little memory for an engine's workspace; export with fewer slots")
            context.set_optimization_profile_async(profile, self._stream)
            self._contexts.append(context)

    def run(self, profile: int, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Queue a run. shapes: of the inputs; addresses: of everything."""
        context = self._contexts[profile]
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"the engine refuses {name} of shape {shape}")
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(self._stream):
            raise RuntimeError("the engine did not run; its log says why")
