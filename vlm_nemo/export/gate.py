"""Refuse a graph that a runtime would take and compute wrongly, before anything is compiled from it.

TensorRT's parser drops Attention's `nonpad_kv_seqlen` without a word: the engine builds, and decodes wrongly. Other
forms (`is_causal` beside a mask, caches as Attention's own inputs and outputs) it refuses or reads in another way. So
each export is held against the one form that every runtime reads alike: a cache updated by TensorScatter, attention
under an explicit mask and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from vlm_nemo.export.graph import OPSET

OPERATORS = frozenset(
    "Add Attention Cast Concat Div Expand Gather GatherND Gelu LayerNormalization LessOrEqual MatMul Mul ReduceMean "
    "Reshape Shape Sigmoid Slice Split Sqrt Sub TensorScatter Transpose Unsqueeze".split()
)
"""What ONNX Runtime, TensorRT and TensorRT-RTX have all been seen to run."""
_ATTENTION_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_ATTENTION_OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
_NEUTRAL = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
"""Attributes of Attention that may be written where they say nothing."""


class GateError(Exception):
    """A graph that must not be shipped: a bug of the exporter, not of the user."""


def check_graph(path: Path, layers: int | None) -> None:
    """ONNX's own full check, the allowed operators, and the form of cache and attention.

    layers: of the decoder; None = a graph without a cache. Raises GateError naming the node.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{path}: {error}") from error
    model = onnx.load(path, load_external_data=False)
    opsets = {(entry.domain, entry.version) for entry in model.opset_import}
    if opsets != {("", OPSET)}:
        raise GateError(f"{path}: opsets {sorted(opsets)}, not {OPSET} alone")
    for node in model.graph.node:
        if node.op_type not in OPERATORS or node.domain:
            raise GateError(f"{path}: node {node.name} is a {node.domain or 'standard'} {node.op_type}, not allowed")
        if node.op_type == "Attention":
            _check_attention(path, node, masked=layers is not None)
    _check_cache(path, model.graph, layers or 0)


def _check_attention(path: Path, node: onnx.NodeProto, *, masked: bool) -> None:
    given = {name for name, value in zip(_ATTENTION_INPUTS, node.input, strict=False) if value}
    wanted = {"Q", "K", "V"} | ({"attn_mask"} if masked else set())
    if given != wanted:
        raise GateError(f"{path}: {node.name} takes {sorted(given)}, not {sorted(wanted)}")
    if extra := [name for name, value in zip(_ATTENTION_OUTPUTS, node.output, strict=False) if value][1:]:
        raise GateError(f"{path}: {node.name} gives {', '.join(extra)}, which TensorRT refuses")
    for attribute in node.attribute:
        value: Any = onnx.helper.get_attribute_value(attribute)
        if attribute.name not in _NEUTRAL or _NEUTRAL[attribute.name] != value:
            raise GateError(f"{path}: {node.name} has {attribute.name}={value}")


def _check_cache(path: Path, graph: onnx.GraphProto, layers: int) -> None:
    """Every past_… goes through one TensorScatter to its present_…, and on to one Attention, as keys or as values."""
    updates = [node for node in graph.node if node.op_type == "TensorScatter"]
    attention = [node for node in graph.node if node.op_type == "Attention"]
    if len(updates) != 2 * layers or (layers and len(attention) != layers):
        raise GateError(
            f"{path}: {len(updates)} cache updates and {len(attention)} attentions in {layers} layers; "
            f"there must be {2 * layers} and {layers}"
        )
    masks = {node.input[3] for node in attention} if layers else set()
    if len(masks) > 1:
        raise GateError(f"{path}: the layers use {len(masks)} masks; they must share one")
    inputs, outputs = {i.name for i in graph.input}, {o.name for o in graph.output}
    for node in updates:
        kind, _, number = node.input[0].removeprefix("past_").rpartition("_")
        present = f"present_{kind}_{number}"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if (
            node.input[0] not in inputs
            or node.input[2] != "write_indices"
            or attributes != {"axis": 2, "mode": b"linear"}
            or list(node.output) != [present]
            or present not in outputs
        ):
            raise GateError(f"{path}: {node.name} is no update of a cache in place: past_… to present_… along axis 2")
        if [a.input[1 if kind == "key" else 2] for a in attention].count(present) != 1:
            raise GateError(f"{path}: {present} is not what one attention reads as its {kind}")
