"""An export through ONNX Runtime: on any CPU, or on a GPU where its CUDA build is installed. No torch here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.bundle import Bundle
from vlm_nemo.infer.static_cache import StaticCacheBackend
from vlm_nemo.types import UserError

_ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16}
"""ONNX's numbers for the types."""
_INT64 = 7
_IMAGE_BATCH = 8
"""Images at once: bounds the memory of many."""


def has_cuda() -> bool:
    """Whether this ONNX Runtime is the CUDA build and finds a GPU."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    return "CUDAExecutionProvider" in ort.get_available_providers()


class OnnxBackend(StaticCacheBackend):
    """The graphs of a bundle in ONNX Runtime, the cache written in place: no step copies it."""

    def __init__(self, bundle: Bundle, *, slots: int | None = None, device: str = "cpu", threads: int = 0) -> None:
        """slots: None = the bundle's. device: cpu | cuda. threads: of one operator on a CPU; 0 = all cores.

        Raises UserError where the runtime, or a type on that device, is missing.
        """
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError(f"ONNX Runtime is not installed ({error}); pip install onnxruntime") from None
        if device not in ("cpu", "cuda"):
            raise UserError(f"device={device} is unknown to ONNX Runtime's backend; choose cpu or cuda")
        if device == "cpu" and bundle.precision == "bf16":
            raise UserError(
                f"{bundle.folder} is bf16, for which ONNX Runtime has no CPU kernels; export with precision=fp32"
            )
        if device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UserError("this ONNX Runtime has no CUDA; install onnxruntime-gpu, or use device=cpu")
        super().__init__(bundle, slots or bundle.slots)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if device == "cuda":
            ort.preload_dlls()
            providers.insert(0, "CUDAExecutionProvider")
        self._ort = ort
        self._device = device
        self._element = _ELEMENTS[bundle.precision]
        self._vision = self._session(bundle.vision_graph, options, providers)
        self._language = self._session(bundle.language_graph, options, providers)
        # Zeros: a masked place has weight zero, and zero times a NaN of fresh memory would be NaN
        self._slot_bytes = math.prod(bundle.cache_shape(1)) * bundle.storage.itemsize
        self._cache = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(self.slots * self._slot_bytes, dtype=np.uint8), device, 0)
            for _ in range(2 * bundle.layers)
        ]
        """Bytes that stay at one address; the bindings say what type they are."""

    def _session(self, path: Any, options: Any, providers: list[str]) -> Any:
        try:
            return self._ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the library raises its own plain Exceptions
            raise UserError(f"ONNX Runtime refuses {path}: {' '.join(str(error).split())[:300]}") from None

    def embed_images(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        return np.concatenate(
            [self._embed_images(images[i : i + _IMAGE_BATCH]) for i in range(0, len(images), _IMAGE_BATCH)]
        )

    def _embed_images(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        bundle = self.bundle
        out = np.empty((len(images), bundle.image_tokens, bundle.hidden_size), dtype=bundle.storage)
        binding = self._vision.io_binding()
        pixels = np.ascontiguousarray(images)
        binding.bind_input("pixels", "cpu", 0, np.uint8, pixels.shape, pixels.ctypes.data)
        binding.bind_output("image_embeds", "cpu", 0, self._element, out.shape, out.ctypes.data)
        self._vision.run_with_iobinding(binding)
        return out

    def step(
        self,
        first: int,
        embeds: NDArray[Any],
        positions: NDArray[np.int64],
        write: NDArray[np.int64],
        last: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        count = len(embeds)
        logits = np.empty((count, self.bundle.vocab_size), dtype=np.float32)
        binding = self._language.io_binding()
        # Held until the run is over: the binding keeps addresses, not arrays
        held = [np.ascontiguousarray(x) for x in (embeds, positions, write, last)]
        for name, x, element in zip(
            ("inputs_embeds", "position_ids", "write_indices", "last_index"),
            held,
            (self._element, _INT64, _INT64, _INT64),
            strict=True,
        ):
            binding.bind_input(name, "cpu", 0, element, x.shape, x.ctypes.data)
        shape = self.bundle.cache_shape(count)
        for i, cache in enumerate(self._cache):
            name = f"{('key', 'value')[i % 2]}_{i // 2}"
            address = cache.data_ptr() + first * self._slot_bytes
            binding.bind_input("past_" + name, self._device, 0, self._element, shape, address)
            binding.bind_output("present_" + name, self._device, 0, self._element, shape, address)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        binding.synchronize_inputs()
        self._language.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits
