"""The links between the nodes of a graph, for edits that replace several nodes by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


class Links:
    """The links between the nodes of a graph.

    Attributes:
        made_by: the node that computes a value, by the value's name.
        users: the nodes that use a value, by the value's name; outputs of the graph are not counted.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._kept = {port.name for port in graph.output}
        self.made_by = {name: node for node in graph.node for name in node.output}
        self._types = {value.name: value.type.tensor_type for value in [*graph.value_info, *graph.input]}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in used_by(node):
                self.users.setdefault(name, []).append(node)

    def constant(self, name: str, kind: int, rank: int) -> onnx.TensorProto | None:
        """The initializer of this name, if it has the data type and the number of dimensions."""
        tensor = self._constants.get(name)
        return tensor if tensor is not None and tensor.data_type == kind and len(tensor.dims) == rank else None

    def equals(self, name: str, value: Any) -> bool:
        """Whether a value is an initializer, stored in the graph itself, that equals an array in type and contents."""
        tensor, wanted = self._constants.get(name), np.asarray(value)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL or tuple(tensor.dims) != wanted.shape:
            return False
        found = numpy_helper.to_array(tensor)
        return found.dtype == wanted.dtype and bool(np.array_equal(found, wanted))

    def maker(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node that computes a value, if it is one of this operator of ONNX."""
        node = self.made_by.get(name)
        return node if node is not None and (node.domain, node.op_type) == ("", operator) else None

    def only_user(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node that uses a value, if it is the only use of the value and one of this operator of ONNX."""
        users = self.users.get(name, [])
        if len(users) != 1 or name in self._kept or (users[0].domain, users[0].op_type) != ("", operator):
            return None
        return users[0]

    def shape(self, name: str) -> list[int]:
        """The contents of a constant shape that is stored in the graph itself; empty if a value is none."""
        tensor = self.constant(name, TensorProto.INT64, 1)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return []
        return [int(size) for size in numpy_helper.to_array(tensor)]

    def is_float(self, name: str) -> bool:
        """Whether a value is known to be fp32."""
        return name in self._types and self._types[name].elem_type == TensorProto.FLOAT

    def dims(self, name: str) -> list[str | int]:
        """The dimensions of a value, by name or size; empty if they are not known."""
        found = self._types.get(name)
        dims = [] if found is None else [dim.dim_param or dim.dim_value for dim in found.shape.dim]
        return dims if all(dims) else []

    def same_shape(self, first: str, second: str) -> bool:
        """Whether two different values have the same known dimensions."""
        return first != second and self.dims(first) == self.dims(second) != []


def used_by(node: onnx.NodeProto) -> set[str]:
    """The names of the values that a node uses, including those that the graphs in its attributes use."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            names.update(port.name for port in graph.output)
            names.update(name for inner in graph.node for name in used_by(inner))
    return names
