"""A few calls of the CUDA runtime: memory, copies, one stream. No torch here."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from vlm_nemo.types import UserError


class Cuda:
    """One device and one stream on it; everything below runs in the stream's order."""

    def __init__(self, device: int = 0) -> None:
        """Raises UserError where there is no GPU, or no cuda-python to talk to it."""
        try:
            from cuda.bindings import runtime
        except (ImportError, OSError) as error:
            raise UserError(f"TensorRT's engines need cuda-python ({error}); pip install cuda-bindings") from None
        self._runtime = runtime
        try:
            status, count = runtime.cudaGetDeviceCount()
        except RuntimeError as error:  # the driver's library itself is missing
            raise UserError(f"TensorRT's engines need a GPU; the driver says: {error}") from None
        if int(status) != 0 or count <= device:
            raise UserError(
                "TensorRT's engines need a GPU and there is none here; ONNX Runtime runs the same export on a CPU "
                "(precision=fp32)"
            )
        self._call(runtime.cudaSetDevice(device))
        self.device = device
        self.stream: Any = self._call(runtime.cudaStreamCreate())
        self._owned: list[int] = []

    @property
    def capability(self) -> int:
        """89 = SM 8.9"""
        kinds = self._runtime.cudaDeviceAttr
        major, minor = (
            self._call(self._runtime.cudaDeviceGetAttribute(kind, self.device))
            for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        )
        return 10 * int(major) + int(minor)

    def zeros(self, nbytes: int) -> int:
        """The address of fresh memory, all zero."""
        address = int(self._call(self._runtime.cudaMalloc(nbytes)))
        self._owned.append(address)
        self._call(self._runtime.cudaMemsetAsync(address, 0, nbytes, self.stream))
        return address

    def send(self, values: NDArray[Any], address: int) -> None:
        """Copy to the device. values: contiguous; it may be reused when the call returns."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync(address, values.ctypes.data, values.nbytes, kind, self.stream))
        self.wait()

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        """Copy from the device, after everything before it is done."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync(values.ctypes.data, address, values.nbytes, kind, self.stream))
        self.wait()

    def wait(self) -> None:
        self._call(self._runtime.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Give the memory back."""
        for address in self._owned:
            self._call(self._runtime.cudaFree(address))
        self._owned.clear()
        self._call(self._runtime.cudaStreamDestroy(self.stream))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """The value of a call's (status, value). Raises RuntimeError with CUDA's words; UserError for no memory."""
        status, *values = answer
        if int(status) != 0:
            name = status.name
            if name == "cudaErrorMemoryAllocation":
                raise UserError("the GPU has too little memory; export with fewer slots or a smaller capacity")
            raise RuntimeError(f"CUDA: {name}")
        return values[0] if values else None
