"""TensorRT-RTX compiles both graphs, for devices that are not here; what it cannot do is said in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.export.twin import CAPACITY, export, files
from vlm_nemo.export import tensorrt
from vlm_nemo.export.gate import GateError
from vlm_nemo.infer.bundle import open_bundle
from vlm_nemo.infer.tensorrt_backend import TensorRTBackend, choose_engines
from vlm_nemo.types import UserError

if "CI" in os.environ:  # there it must run
    import tensorrt_rtx as trt
else:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")


@pytest.fixture(scope="module")
def compiled(llava_twin: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "bf16"
    words = ("precision=bf16", "slots=4", f"capacity={CAPACITY}", "engine=tensorrt_rtx", "engine_sm=[89,120]")
    export(f"hf={llava_twin[0]}", f"out={out}", *words)
    return out


def test_both_graphs_are_compiled_for_both_devices(compiled: Path) -> None:
    bundle = open_bundle(compiled)
    for sm in (89, 120):
        name = f"tensorrt_rtx-{trt.__version__}-sm{sm}-bf16"
        engines = choose_engines(bundle, "tensorrt_rtx", trt.__version__, sm)
        assert engines.folder == compiled / "engines" / name
        assert (engines.slots, engines.capacity) == (4, CAPACITY)
        for part in ("vision", "llm"):
            assert (engines.folder / f"{part}.engine").stat().st_size > 100_000
            assert f"engines/{name}/{part}.engine" in bundle.manifest["files"]
        build = json.loads((engines.folder / "build.json").read_text())
        assert build["compute_capability"] == sm and set(build["bytes"]) == {"vision", "llm"}
    assert bundle.manifest["versions"]["tensorrt_rtx"] == trt.__version__
    assert not any("twin" in name for name in files(compiled))


def test_bf16_says_that_a_twin_was_run(compiled: Path) -> None:
    report = json.loads((compiled / "parity.json").read_text())
    assert report == json.loads((compiled / "manifest.json").read_text())["parity"]
    assert (report["precision"], report["ran"], report["ok"]) == ("bf16", "fp32", True)
    assert "the bf16 graphs themselves were checked and not run" in report["note"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_compile(llava_twin: tuple[Path, Any], exported: Path, tmp_path: Path, precision: str) -> None:
    out = exported
    if precision != "fp32":
        out = tmp_path / "out"
        export(f"hf={llava_twin[0]}", f"out={out}", f"precision={precision}", f"capacity={CAPACITY}")
    bundle = open_bundle(out)
    engine = tensorrt.compile_graph(
        trt, bundle.language_graph, bundle.layers, [tensorrt._decode_shapes(bundle)], capability=89
    )
    assert engine.nbytes > 100_000


def test_a_device_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine_sm=90: tensorrt_rtx .* compiles for \[75, 80, 86, 89, 120, 121\]"):
        tensorrt.capabilities(trt, [89, 90])
    with pytest.raises(UserError, match=r"engine_sm is not set and there is no GPU here; name them"):
        tensorrt.capabilities(trt, [])


def test_a_missing_package_says_where_to_get_it() -> None:
    with pytest.raises(UserError, match="engine=tensorrt: .*nvcr.io.*engine=tensorrt_rtx needs neither"):
        tensorrt.load_backend("tensorrt")


def test_a_refusal_names_the_node(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes((exported / "llm" / "model.onnx.data").read_bytes())
    model = onnx.load(exported / "llm" / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f"tensorrt_rtx refuses .*{node.name}"):
        tensorrt.compile_graph(trt, tmp_path / "model.onnx", 2, [], capability=89)


def test_what_the_parser_made_of_a_graph_is_checked(exported: Path) -> None:
    bundle = open_bundle(exported)
    with pytest.raises(GateError, match="read 4 cache updates and 2 attentions from 3 layers"):
        tensorrt.compile_graph(trt, bundle.language_graph, 3, [], capability=89)


def test_without_a_gpu_the_backend_says_so(compiled: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="need a GPU"):
        TensorRTBackend(open_bundle(compiled), "tensorrt_rtx")


def test_an_engine_of_another_device_or_version_is_not_taken(compiled: Path, exported: Path) -> None:
    bundle = open_bundle(compiled)
    with pytest.raises(UserError, match=r"and none for tensorrt_rtx 1\.0 on sm89: .*engine_sm=\[89\]"):
        choose_engines(bundle, "tensorrt_rtx", "1.0", 89)
    with pytest.raises(UserError, match="none for tensorrt_rtx .* on sm75"):
        choose_engines(bundle, "tensorrt_rtx", trt.__version__, 75)
    with pytest.raises(UserError, match="has no engines, and none for tensorrt 10 on sm90"):
        choose_engines(open_bundle(exported), "tensorrt", "10", 90)
