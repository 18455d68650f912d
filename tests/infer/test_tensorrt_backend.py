"""The TensorRT backend against ONNX Runtime's, its device played by this machine's memory.

What runs an engine here is ONNX Runtime on the addresses and shapes that the backend hands over: a wrong address, a
wrong profile, a cache that is not updated in place would show. That the engines themselves are right, only a GPU can
show.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.export.twin import prompts
from tests.squares import squares
from vlm_nemo.infer import tensorrt_backend
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.bundle import open_bundle, sha256
from vlm_nemo.infer.onnx_backend import OnnxBackend
from vlm_nemo.infer.tensorrt_backend import TensorRTBackend
from vlm_nemo.types import UserError

ELEMENTS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
VERSION = "0.test"


class HostCuda:
    """cuda_memory.Cuda, in the host's memory."""

    capability = 99
    stream = 7

    def __init__(self, device: int = 0) -> None:
        self.held: list[Any] = []

    def zeros(self, nbytes: int) -> int:
        self.held.append(ctypes.create_string_buffer(nbytes))
        return ctypes.addressof(self.held[-1])

    def send(self, values: NDArray[Any], address: int) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def close(self) -> None:
        self.held.clear()


class HostContext:
    """An execution context that is an ONNX Runtime session."""

    def __init__(self, session: onnxruntime.InferenceSession, log: list[tuple[int, tuple[int, ...]]]) -> None:
        self.session, self.log = session, log
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name in {i.name for i in self.session.get_inputs()}

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostCuda.stream
        feeds = {}
        for i in self.session.get_inputs():
            dtype, shape = np.dtype(ELEMENTS[i.type]), self.shapes[i.name]
            raw = ctypes.string_at(self.addresses[i.name], int(np.prod(shape)) * dtype.itemsize)
            feeds[i.name] = np.frombuffer(raw, dtype=dtype).reshape(shape)
        if "inputs_embeds" in feeds:
            self.log.append((self.profile, feeds["inputs_embeds"].shape[:2]))
        for o, values in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            ctypes.memmove(self.addresses[o.name], values.ctypes.data, values.nbytes)
        return True


@pytest.fixture
def compiled(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Any]]:
    """An export with "engines" for the device that is played, and a log of what they ran."""
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    folder = out / "engines" / "host"
    folder.mkdir(parents=True)
    for name in ("vision", "llm"):
        (folder / f"{name}.engine").write_bytes(str(exported / name / "model.onnx").encode())
    build = {"backend": "host_trt", "version": VERSION, "compute_capability": 99, "precision": "fp32"}
    (folder / "build.json").write_text(json.dumps({**build, "slots": 4, "capacity": 48, "image_batch": 2}))
    manifest = json.loads((out / "manifest.json").read_text())
    for path in folder.iterdir():
        entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest["files"][path.relative_to(out).as_posix()] = entry
    (out / "manifest.json").write_text(json.dumps(manifest))
    log: list[Any] = []

    def engine(content: bytes) -> Any:
        session = onnxruntime.InferenceSession(content.decode())
        return SimpleNamespace(create_execution_context=lambda: HostContext(session, log))

    trt: Any = ModuleType("host_trt")
    trt.__version__ = VERSION
    trt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=engine)
    monkeypatch.setitem(sys.modules, "host_trt", trt)
    monkeypatch.setattr(tensorrt_backend, "Cuda", HostCuda)
    return out, log


def test_it_hands_the_engines_what_onnx_runtime_gets(exported: Path, compiled: tuple[Path, list[Any]]) -> None:
    out, log = compiled
    ours, witness = TensorRTBackend(open_bundle(out), "host_trt"), OnnxBackend(open_bundle(exported))
    asked = [(slot, *prompt) for slot, prompt in zip((3, 0, 2), prompts(), strict=True)]
    rows = [
        Row(slot=slot, start=0, tokens=tokens.tolist(), images=squares(images, tokens))
        for slot, tokens, images in asked
    ]
    for step in range(4):
        got, expected = ours.run(rows), witness.run(rows)
        assert np.abs(got - expected).max() < 1e-5
        following = expected.argmax(-1).tolist()
        rows = [
            Row(slot=row.slot, start=row.start + len(row.tokens), tokens=[token])
            for row, token in zip(rows, following, strict=True)
        ][step % 2 :]  # one of them stays behind every other step
    assert log[:3] == [(0, (1, 7)), (0, (1, 13)), (0, (1, 19))]
    assert {profile for profile, _ in log[3:]} == {1}
    assert log[3] == (1, (4, 1))
    many = np.concatenate([images for _, _, images in asked if images is not None])
    assert np.abs(ours.embed_images(many) - witness.embed_images(many)).max() < 1e-5
    ours.close()


def test_slots_and_batches_beyond_what_was_compiled_are_refused(
    exported: Path, compiled: tuple[Path, list[Any]]
) -> None:
    bundle = open_bundle(compiled[0])
    with pytest.raises(UserError, match="slots=5, but host was compiled for 4"):
        TensorRTBackend(bundle, "host_trt", slots=5)
    backend = TensorRTBackend(bundle, "host_trt")
    zeros = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="not 2 x 3 tokens"):
        backend.step(0, np.zeros((2, 3, 32), dtype=np.float32), np.zeros((2, 3), dtype=np.int64), zeros, zeros)
