"""Write an ONNX graph node by node, its weights in a file beside it.

The graphs are written by hand rather than traced: what TensorRT takes is a narrow set of operators in particular
forms, and a tracer chooses its own. No weights are held here; see tensors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vlm_nemo.export.tensors import TensorFile

OPSET = 24
"""The first with TensorScatter, the cache's update in place."""
IR_VERSION = 11
ONNX_TYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
Dim = int | str


class Graph:
    """One graph under construction. Methods that add a node return the name of its output."""

    def __init__(self, name: str, data: TensorFile) -> None:
        self.name = name
        self.data = data
        self.type = ONNX_TYPES[data.precision]
        """The weights' and activations' type."""
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def input(self, name: str, type: int, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, type, shape))
        return name

    def output(self, name: str, type: int, shape: Sequence[Dim]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, type, shape))

    def node(self, op: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """Add a node of one output. to: the output's name; None = a new one."""
        return self.nodes(op, *inputs, to=[to or self._fresh(op)], **attributes)[0]

    def nodes(self, op: str, *inputs: str, to: Sequence[str], **attributes: Any) -> Sequence[str]:
        """Add a node of several outputs."""
        self._nodes.append(helper.make_node(op, inputs, list(to), name=f"{to[0]}:{op}", **attributes))
        return to

    def weight(self, source: str, shape: Sequence[int], *, transposed: bool = False) -> str:
        """A weight under its Hugging Face name, in the graph's type."""
        if source not in self._initializers:
            place = self.data.reserve(source, shape, transposed=transposed)
            stored = [int(np.prod(shape[1:])), shape[0]] if transposed else list(shape)
            self._initializers[source] = self._external(source, self.type, stored, place.offset, place.nbytes)
        return source

    def table(self, name: str, values: NDArray[Any]) -> str:
        """A large constant of numpy's own type, beside the weights."""
        type = helper.np_dtype_to_tensor_dtype(values.dtype)
        content = np.ascontiguousarray(values).tobytes()
        offset = self.data.constant(content)
        self._initializers[name] = self._external(name, type, values.shape, offset, len(content))
        return name

    def ints(self, *values: int) -> str:
        """A small int64 vector: shapes, axes."""
        name = "ints_" + "_".join(map(str, values)).replace("-", "m")
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values))
        return name

    def scalar(self, value: float, type: int | None = None) -> str:
        """A number, in the graph's type unless another is given."""
        type = self.type if type is None else type
        name = f"number_{value!r}_{type}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, type, [], [value])
        return name

    def cast(self, x: str, type: int, name: str | None = None) -> str:
        """`x` in another type; a node even where it has that type already, so that every precision is one graph."""
        name = name or self._fresh("Cast")
        self._nodes.append(helper.make_node("Cast", [x], [name], name=f"{name}:Cast", to=type))
        return name

    def save(self) -> None:
        """Write model.onnx beside the data file, which `fill` writes."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="vlm_nemo",
        )
        path = self.data.path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString())

    def _external(self, name: str, type: int, shape: Sequence[int], offset: int, length: int) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data.path.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    def _fresh(self, op: str) -> str:
        self._count += 1
        return f"{op}_{self._count}"
