"""Compile an export's graphs: one builder for TensorRT and TensorRT-RTX, whose Python interfaces are the same.

TensorRT compiles for the GPU that it runs on. TensorRT-RTX compiles for any compute capability that it knows, without
a GPU, and finishes the work on the device that loads the engine.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vlm_nemo.export.gate import GateError
from vlm_nemo.infer.bundle import Bundle
from vlm_nemo.types import UserError

BACKENDS = ("tensorrt", "tensorrt_rtx")
IMAGE_BATCH = 8
"""Images that the vision engine takes at once."""
_WHERE = {
    "tensorrt": "it comes with NVIDIA's images (nvcr.io/nvidia/tensorrt, nvcr.io/nvidia/pytorch), or pip install "
    "tensorrt from NVIDIA's package index; engine=tensorrt_rtx needs neither them nor a GPU",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}
Shapes = Callable[[str, tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""An input's name and shape -> its smallest, usual and largest shape."""


def load_backend(name: str) -> ModuleType:
    """The module. Raises UserError that says how to get it."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(f"engine={name}: the package {name} does not import ({error}); {_WHERE[name]}") from None
    if not hasattr(module, "Builder"):
        raise UserError(f"engine={name}: the package {name} is a stub without libraries; {_WHERE[name]}")
    if not hasattr(module.LayerType, "KV_CACHE_UPDATE"):
        raise UserError(
            f"engine={name}: {name} {module.__version__} cannot update a cache in place; install a newer one"
        )
    return module


def capabilities(trt: ModuleType, asked: Sequence[int]) -> list[int]:
    """The compute capabilities to compile for: those asked for, or this machine's GPU. Raises UserError."""
    name = trt.__name__
    if name == "tensorrt":
        here = _device_capability()
        if here is None:
            raise UserError("engine=tensorrt compiles on the GPU that it is for, and there is none here")
        if list(asked) not in ([], [here]):
            raise UserError(f"engine_sm={list(asked)}: TensorRT compiles for the GPU that is here, sm{here}, only")
        return [here]
    known = sorted(int(n[2:]) for n in dir(trt.ComputeCapability) if n.startswith("SM"))
    wanted = list(asked)
    if not wanted:
        here = _device_capability()
        if here is None:
            raise UserError(f"engine_sm is not set and there is no GPU here; name them: engine_sm=[89,120] of {known}")
        wanted = [here]
    if strange := [sm for sm in wanted if sm not in known]:
        raise UserError(f"engine_sm={strange[0]}: {name} {trt.__version__} compiles for {known}")
    return wanted


def _device_capability() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def build_engines(trt: ModuleType, bundle: Bundle, capability: int, say: Callable[[str], None]) -> Path:
    """Compile both graphs for one compute capability; the folder, engines/<backend>-<version>-sm<cc>-<precision>.

    Raises UserError with the parser's or builder's own words and the node's name.
    """
    backend = trt.__name__
    folder = bundle.folder / "engines" / f"{backend}-{trt.__version__}-sm{capability}-{bundle.precision}"
    folder.mkdir(parents=True, exist_ok=True)
    graphs: dict[str, tuple[Path, int | None, list[Shapes]]] = {
        "vision": (bundle.vision_graph, None, [_vision_shapes]),
        "llm": (bundle.language_graph, bundle.layers, [_prefill_shapes(bundle), _decode_shapes(bundle)]),
    }
    sizes, seconds = {}, {}
    for name, (path, layers, profiles) in graphs.items():
        began = time.perf_counter()
        engine = compile_graph(trt, path, layers, profiles, capability)
        (folder / f"{name}.engine").write_bytes(engine)
        sizes[name], seconds[name] = engine.nbytes, round(time.perf_counter() - began, 1)
        say(f"compiled {folder.name}/{name}.engine: {engine.nbytes / 1e6:.1f} MB in {seconds[name]} s")
    build = {
        "backend": backend,
        "version": trt.__version__,
        "compute_capability": capability,
        "precision": bundle.precision,
        "slots": bundle.slots,
        "capacity": bundle.capacity,
        "image_batch": IMAGE_BATCH,
        "profiles": {"vision": ["images"], "llm": ["prefill", "decode"]},
        "bytes": sizes,
        "seconds": seconds,
    }
    (folder / "build.json").write_text(json.dumps(build, indent=1) + "\n")
    return folder


def compile_graph(
    trt: ModuleType, path: Path, layers: int | None, profiles: Sequence[Shapes], capability: int
) -> memoryview:
    """One graph to one serialised engine, strongly typed: the graph's own types decide. See `build_engines`."""
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"node {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors) or logger.told()
        raise UserError(f"{trt.__name__} refuses {path}: {told}")
    check_network(trt, network, layers)
    config = builder.create_builder_config()
    if trt.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape)))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{trt.__name__} cannot compile {path} for sm{capability}: {logger.told()}")
    return memoryview(engine)


def check_network(trt: ModuleType, network: Any, layers: int | None) -> None:
    """The gate once more, on what the parser made of the graph; allows attention without a fused kernel.

    A parser that dropped or reread something shows here: 2 x layers cache updates, every attention of the decoder
    masked, none causal. Raises GateError.
    """
    found = [network.get_layer(i) for i in range(network.num_layers)]
    updates = sum(layer.type == trt.LayerType.KV_CACHE_UPDATE for layer in found)
    attentions = []
    for layer in found:
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the binding hands out its base class
            attentions.append((layer.name, layer.attention))
    if updates != 2 * (layers or 0) or (layers is not None and len(attentions) != layers):
        raise GateError(
            f"{trt.__name__} read {updates} cache updates and {len(attentions)} attentions from {layers} layers"
        )
    for name, attention in attentions:
        causal = getattr(attention, "causal_kind", None)
        if attention.causal or (causal is not None and causal != trt.CausalMaskKind.NONE):
            raise GateError(f"{trt.__name__} reads {name} as causal")
        if (attention.mask is None) != (layers is None):
            raise GateError(f"{trt.__name__} reads {name} {'without' if layers is not None else 'with'} a mask")
        # Small heads and fp32 have no fused kernel; without this the builder gives up on them
        attention.decomposable = True


def _strongly_typed(trt: ModuleType) -> int:
    """The flags of a network whose types are the graph's; TensorRT 11 knows no other and has dropped the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _vision_shapes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    one = (1, *shape[1:])
    return one, one, (IMAGE_BATCH, *shape[1:])


def _prefill_shapes(bundle: Bundle) -> Shapes:
    """A prompt alone, up to the whole capacity."""
    return _language_shapes((1, 1, 1), (1, max(1, bundle.capacity // 4), bundle.capacity))


def _decode_shapes(bundle: Bundle) -> Shapes:
    """A token of each sequence, up to all slots."""
    return _language_shapes((1, bundle.slots, bundle.slots), (1, 1, 1))


def _language_shapes(batch: tuple[int, int, int], length: tuple[int, int, int]) -> Shapes:
    def shapes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        sized = [
            (b, s) if name in ("inputs_embeds", "position_ids") else (b,) for b, s in zip(batch, length, strict=True)
        ]
        low, usual, high = ((*dims, *shape[len(dims) :]) for dims in sized)
        return low, usual, high

    return shapes


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Keeps what the library says of errors, for the one line that the user sees."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def told(self) -> str:
            return "; ".join(dict.fromkeys(self.errors))[:600] or "it does not say why"

    return Logger()
