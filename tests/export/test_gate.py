"""Graphs that a runtime would compute wrongly are refused, the fault that TensorRT swallows in silence among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import GraphProto, NodeProto, TensorProto, helper

from vlm_nemo.export.gate import GateError, check_graph

LAYERS = 2


def attention(graph: GraphProto) -> NodeProto:
    return next(node for node in graph.node if node.op_type == "Attention")


def drop_the_padding_by_length(graph: GraphProto) -> None:
    """What one would write to mask the padding of uneven prompts: valid ONNX, and TensorRT's parser ignores it."""
    graph.node.insert(
        0,
        helper.make_node(
            "Add", ["write_indices", "one_of_the_gate_s_test"], ["lengths_in_the_cache"], name="lengths:Add"
        ),
    )
    graph.initializer.append(helper.make_tensor("one_of_the_gate_s_test", TensorProto.INT64, [1], [1]))
    for node in graph.node:
        if node.op_type == "Attention":
            node.input.extend(["", "", "lengths_in_the_cache"])


def causal(graph: GraphProto) -> None:
    attention(graph).attribute.append(helper.make_attribute("is_causal", 1))


def unmasked(graph: GraphProto) -> None:
    attention(graph).input[3] = ""


def soft_cap(graph: GraphProto) -> None:
    attention(graph).attribute.append(helper.make_attribute("softcap", 30.0))


def stale_values(graph: GraphProto) -> None:
    attention(graph).input[2] = "past_value_0"


def rotated_writes(graph: GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "TensorScatter")
    next(a for a in node.attribute if a.name == "mode").s = b"circular"


def foreign_operator(graph: GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "Sigmoid")
    node.op_type = "HardSigmoid"


FAULTS: list[tuple[Callable[[GraphProto], None], str]] = [
    (drop_the_padding_by_length, "nonpad_kv_seqlen"),
    (causal, "is_causal=1"),
    (unmasked, r"takes \['K', 'Q', 'V'\]"),
    (soft_cap, "softcap=30"),
    (stale_values, "present_value_0 is not what one attention reads"),
    (rotated_writes, "no update of a cache in place"),
    (foreign_operator, "HardSigmoid, not allowed"),
]


def planted(exported: Path, folder: Path, fault: Callable[[GraphProto], None]) -> Path:
    shutil.copytree(exported / "llm", folder / "llm")
    path = folder / "llm" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    fault(model.graph)
    path.write_bytes(model.SerializeToString())
    return path


def test_what_is_exported_passes(exported: Path) -> None:
    check_graph(exported / "vision" / "model.onnx", None)
    check_graph(exported / "llm" / "model.onnx", LAYERS)


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_caught(
    exported: Path, tmp_path: Path, fault: Callable[[GraphProto], None], says: str
) -> None:
    with pytest.raises(GateError, match=says):
        check_graph(planted(exported, tmp_path, fault), LAYERS)


def test_the_number_of_layers_is_checked(exported: Path) -> None:
    with pytest.raises(GateError, match="4 cache updates and 2 attentions in 3 layers; there must be 6 and 3"):
        check_graph(exported / "llm" / "model.onnx", 3)


def test_the_gate_is_needed(exported: Path, tmp_path: Path) -> None:
    """ONNX's own check takes the fault, and so does TensorRT-RTX's parser, which then forgets it."""
    path = planted(exported, tmp_path, drop_the_padding_by_length)
    onnx.checker.check_model(str(path), full_check=True)
    if "CI" not in os.environ:  # there it must run
        pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
