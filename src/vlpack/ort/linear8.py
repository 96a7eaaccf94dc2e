"""The replacement of products by 8-bit matrices, and of the nodes around them, by Linear8 and Linear8Blocks.

`vlpack.layers.ops.integer_mat_mul` writes a product by an int8 matrix as a chain of nodes: rows are divided by their
largest magnitudes, rounded, multiplied and multiplied back. The rotation of the input before the chain, and the bias
after it, become part of the operator as well.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlpack.quantize.channels import ZERO_POINT

STEP = np.float32(1 / 127)
"""The step to which rows are rounded after they are divided by their largest magnitude."""

SMALLEST = np.float32(1e-20)
"""The number that is added to a largest magnitude, so that rows of zeros are not divided by 0."""


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
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in _used_by(node):
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


def use_linear8(model: onnx.ModelProto, domain: str) -> Counter[str]:
    """Replaces products by 8-bit matrices; weights stay in their files.

    Args:
        model: a graph as vlpack writes it; edited in place.
        domain: domain of the operators.

    Returns:
        The number of products that were replaced, by operator.
    """
    links, made, removed = Links(model.graph), dict[str, onnx.NodeProto](), set[str]()
    for node in model.graph.node:
        found = _replacement(node, links)
        if found is not None:
            found[0].domain = domain
            made[found[0].output[0]] = found[0]
            removed.update(found[1])
    # an operator takes the place of the last node of its chain, whose output it has
    nodes = [made.get(node.output[0], node) for node in model.graph.node if node.output[0] not in removed - set(made)]
    if made:
        kept = _without_unused(nodes, model.graph)
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return Counter(node.op_type for node in made.values())


def _replacement(node: onnx.NodeProto, links: Links) -> tuple[onnx.NodeProto, list[str]] | None:
    """The operator that replaces a product, and the outputs of the nodes that it replaces; None if there is none."""
    if node.domain == "com.microsoft" and node.op_type == "MatMulIntegerToFloat":
        return _channels(node, links)
    if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
        return _blocks(node, links)
    return None


def _channels(product: onnx.NodeProto, links: Links) -> tuple[onnx.NodeProto, list[str]] | None:
    """The operator Linear8 for a product by signed codes with a scale per channel."""
    if len(product.input) != 5:
        return None
    codes, weight, step, scales, zero = product.input
    rounded, back = links.maker(codes, "QuantizeLinear"), links.only_user(product.output[0], "Mul")
    if rounded is None or back is None or list(rounded.input[1:]) != [step, zero] or rounded.attribute:
        return None
    if not links.equals(step, STEP) or not links.equals(zero, np.uint8(ZERO_POINT)):
        return None
    if not links.constant(weight, TensorProto.INT8, 2) or not links.constant(scales, TensorProto.FLOAT, 1):
        return None
    divided = links.maker(rounded.input[0], "Div")
    if divided is None or list(back.input) != [product.output[0], divided.input[1]] or not _by_peak(divided, links):
        return None
    before, rotation = _rotated(divided.input[0], links)
    inputs, replaced = [before, weight, scales, rotation], [product.output[0], back.output[0]]
    add = links.only_user(back.output[0], "Add")
    if add is not None:
        bias = next(name for name in [*add.input, ""] if name != back.output[0])
        if links.constant(bias, TensorProto.FLOAT, 1):
            inputs, replaced = [*inputs, bias], [*replaced, add.output[0]]
    return helper.make_node("Linear8", inputs, replaced[-1:], product.name), replaced


def _blocks(product: onnx.NodeProto, links: Links) -> tuple[onnx.NodeProto, list[str]] | None:
    """The operator Linear8Blocks for a product by 8-bit codes with a scale per block."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in product.attribute}
    sizes = {name: attributes.pop(name, 0) for name in ("K", "N", "block_size")}
    if attributes != {"bits": 8, "accuracy_level": 4} or len(product.input) != 3:
        return None
    x, weight, scales = product.input
    if not links.constant(weight, TensorProto.UINT8, 3) or not links.constant(scales, TensorProto.FLOAT, 2):
        return None
    before, rotation = _rotated(x, links)
    inputs = [before, weight, scales, rotation]
    return helper.make_node("Linear8Blocks", inputs, product.output, product.name, **sizes), list(product.output)


def _by_peak(divided: onnx.NodeProto, links: Links) -> bool:
    """Whether rows are divided by their largest magnitudes, as `vlpack.layers.ops.divide_by_peak` does it."""
    x, peak = divided.input
    add = links.maker(peak, "Add")
    reduce = None if add is None or not links.equals(add.input[1], SMALLEST) else links.maker(add.input[0], "ReduceMax")
    if reduce is None or len(reduce.input) != 2 or not links.equals(reduce.input[1], np.array([-1])):
        return False
    magnitude = links.maker(reduce.input[0], "Abs")
    keeps = {attribute.name: attribute.i for attribute in reduce.attribute} == {"keepdims": 1}
    return magnitude is not None and keeps and magnitude.input[0] == x


def _rotated(name: str, links: Links) -> tuple[str, str]:
    """The value before a rotation, and the matrix by which it is multiplied; the value itself and "" without one."""
    back = links.maker(name, "Reshape")
    turn = None if back is None else links.maker(back.input[0], "MatMul")
    split = None if turn is None else links.maker(turn.input[0], "Reshape")
    matrix = None if turn is None else links.constant(turn.input[1], TensorProto.FLOAT, 2)
    if back is None or turn is None or split is None or matrix is None:
        return name, ""
    size, parts, whole = matrix.dims[0], links.shape(split.input[1]), links.shape(back.input[1])
    # zeros stand for sizes that stay as they are
    if not whole or whole[-1] < 1 or parts != [*[0] * (len(whole) - 1), whole[-1] // size, size]:
        return name, ""
    return (split.input[0], turn.input[1]) if whole[-1] % size == 0 else (name, "")


def _without_unused(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph, in order, without those whose outputs nothing uses."""
    used, kept = {port.name for port in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(_used_by(node))
    return kept[::-1]


def _used_by(node: onnx.NodeProto) -> set[str]:
    """The names of the values that a node uses, including those that the graphs in its attributes use."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            names.update(port.name for port in graph.output)
            names.update(name for inner in graph.node for name in _used_by(inner))
    return names
