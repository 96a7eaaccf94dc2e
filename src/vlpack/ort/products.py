"""The replacement of products by quantized matrices, and of the nodes around them, by operators of vlpack-kernels.

Linear8 replaces a product by an int8 matrix with a scale per channel, which `vlpack.layers.ops.integer_mat_mul` writes
as a chain of nodes: rows are divided by their largest magnitudes, rounded, multiplied and multiplied back.
Linear8Blocks and Linear4 replace MatMulNBits. The activation function and the rotation of the input before a product
become part of the operator as well, and so do the bias and the sum with a residual after it, or the split of the
result.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from vlpack.ort.links import Links, used_by
from vlpack.quantize.channels import ZERO_POINT

STEP = np.float32(1 / 127)
"""The step to which rows are rounded after they are divided by their largest magnitude."""

SMALLEST = np.float32(1e-20)
"""The number that is added to a largest magnitude, so that rows of zeros are not divided by 0."""

SILU, GELU_TANH = 1, 2
"""Values of the operators' attribute ``activation``."""

MOST_OUTPUTS, OUTPUT_MULTIPLE = 3, 16
"""A product can be split into so many outputs, whose sizes must be multiples of this number."""


def use_products(model: onnx.ModelProto, domain: str) -> Counter[str]:
    """Replaces products by 8-bit and 4-bit matrices; weights stay in their files.

    Args:
        model: a graph as vlpack writes it; edited in place.
        domain: domain of the operators.

    Returns:
        The number of products that were replaced, by operator.
    """
    links, made, removed = Links(model.graph), dict[str, onnx.NodeProto](), set[str]()
    for node in model.graph.node:
        found = _replacement(node, links)
        if found is not None and found[0].output[0] not in made:  # two products can meet in one sum
            found[0].domain = domain
            made[found[0].output[0]] = found[0]
            removed.update(found[1])
    # an operator takes the place of the last node of its chain, whose output it has
    gone = removed - set(made)
    nodes = [made.get(node.output[0], node) for node in model.graph.node if node.output[0] not in gone]
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


class _Input(NamedTuple):
    """The input of a product, and what the operator does with it first.

    Attributes:
        x: the value.
        activation: number of the function that is applied to it; 0 for none.
        factor: the value of the same shape by which the result is multiplied; "" for none.
        rotation: the matrix by which groups of its columns are multiplied; "" for none.
    """

    x: str
    activation: int = 0
    factor: str = ""
    rotation: str = ""


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
    matrix = links.constant(weight, TensorProto.INT8, 2)
    if matrix is None or not links.constant(scales, TensorProto.FLOAT, 1):
        return None
    divided = links.maker(rounded.input[0], "Div")
    if divided is None or list(back.input) != [product.output[0], divided.input[1]] or not _by_peak(divided, links):
        return None
    given = _before(divided.input[0], ["Abs", "Div"], links)
    replaced = [product.output[0], back.output[0]]
    return _with_ends("Linear8", given, [weight, scales], matrix.dims[1], replaced, product.name, links)


def _blocks(product: onnx.NodeProto, links: Links) -> tuple[onnx.NodeProto, list[str]] | None:
    """The operator Linear8Blocks or Linear4 for a product by codes with a scale per block and 8-bit activations."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in product.attribute}
    sizes = {name: attributes.pop(name, 0) for name in ("K", "N", "block_size")}
    x, weight, scales, *zeros = product.input
    if attributes.pop("accuracy_level", 0) != 4 or len(zeros) > 1:
        return None
    bits = attributes.pop("bits", 4)
    if bits == 8:
        constants = links.constant(weight, TensorProto.UINT8, 3), links.constant(scales, TensorProto.FLOAT, 2)
        suits, operator, own = None not in constants and not zeros, "Linear8Blocks", [weight, scales]
    else:
        suits = bits == 4 and links.is_float(product.output[0])
        operator, own = "Linear4", [weight, scales, *(zeros or [""])]
    if attributes or not suits:
        return None
    given = _before(x, ["MatMulNBits"], links)
    return _with_ends(operator, given, own, sizes["N"], list(product.output), product.name, links, **sizes)


def _with_ends(
    operator: str,
    given: _Input,
    own: list[str],
    size: int,
    replaced: list[str],
    name: str,
    links: Links,
    **attributes: int,
) -> tuple[onnx.NodeProto, list[str]]:
    """An operator together with the nodes after the product: the bias, and the residual or the split.

    Args:
        operator: name of the operator.
        given: its input.
        own: its inputs for the matrix.
        size: number of columns of the product.
        replaced: outputs of the nodes that it replaces, of which the last one is the product.
        name: name of the node.
        links: the graph's.
        attributes: the operator's own attributes.

    Returns:
        The node, and the outputs of all nodes that it replaces.
    """
    bias, residual, outputs = "", "", replaced[-1:]
    add = links.only_user(outputs[0], "Add")
    constant = None if add is None else links.constant(_other(add, outputs[0]), TensorProto.FLOAT, 1)
    if add is not None and constant is not None and constant.dims[0] == size:
        bias, outputs = _other(add, outputs[0]), list(add.output)
        replaced = [*replaced, *outputs]
        add = links.only_user(outputs[0], "Add")
    split = links.only_user(outputs[0], "Split")
    parts = _part_sizes(split, links.dims(outputs[0]), links) if split is not None else []
    if split is not None and parts:
        outputs = list(split.output)
        attributes |= {"first": parts[0], "second": parts[1]}
    elif add is not None and links.same_shape(*add.input):
        residual, outputs = _other(add, outputs[0]), list(add.output)
    if given.activation:
        attributes["activation"] = given.activation
    inputs = [given.x, *own, given.rotation, bias, given.factor, residual]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(operator, inputs, outputs, name)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return node, [*replaced, outputs[0]]


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


def _other(node: onnx.NodeProto, name: str) -> str:
    """The other input of a node of two; "" if both are the same."""
    return next((given for given in node.input if given != name), "")


def _part_sizes(split: onnx.NodeProto, dims: list[str | int], links: Links) -> list[int]:
    """The sizes of two or three parts of the last dimension; empty if the operator cannot write them."""
    attributes = {attribute.name: attribute.i for attribute in split.attribute}
    count, whole = len(split.output), dims[-1] if dims else 0
    if attributes.get("axis") not in (-1, len(dims) - 1) or not 1 < count <= MOST_OUTPUTS or not all(split.output):
        return []
    sizes = links.shape(split.input[1]) if len(split.input) > 1 else []
    if len(split.input) == 1 and isinstance(whole, int) and whole % count == 0:
        sizes = [whole // count] * count
    fit = len(sizes) == count and all(size > 0 and size % OUTPUT_MULTIPLE == 0 for size in sizes)
    return sizes if fit else []


def _before(name: str, users: list[str], links: Links) -> _Input:
    """What the operator does before it rounds a value.

    Args:
        name: the value that is rounded.
        users: the operators that use it for that.
        links: the graph's.
    """
    x, rotation = _rotated(name, links)
    if sorted(node.op_type for node in links.users[x]) != (["Reshape"] if rotation else users):
        return _Input(x, rotation=rotation)  # another node needs the value, so it is computed in any case
    found, product = _function(x, links), links.maker(x, "Mul")
    if found is None and product is not None and links.same_shape(*product.input):
        for given in product.input:
            found = _function(given, links)
            if found is not None:
                return _Input(*found, _other(product, given), rotation)
    return _Input(x, rotation=rotation) if found is None else _Input(*found, rotation=rotation)


def _function(name: str, links: Links) -> tuple[str, int] | None:
    """The argument of an activation function and the function's number; None if a value is none of these."""
    gelu, product = links.maker(name, "Gelu"), links.maker(name, "Mul")
    if gelu is not None and [helper.get_attribute_value(attribute) for attribute in gelu.attribute] == [b"tanh"]:
        return gelu.input[0], GELU_TANH
    for given in [] if product is None else product.input:
        sigmoid = links.maker(given, "Sigmoid")
        if product is not None and sigmoid is not None and _other(product, given) == sigmoid.input[0]:
            return sigmoid.input[0], SILU
    return None


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
    if not whole or whole[-1] < 1 or any(whole[:-1]) or parts != [*[0] * (len(whole) - 1), whole[-1] // size, size]:
        return name, ""
    return (split.input[0], turn.input[1]) if whole[-1] % size == 0 else (name, "")


def _without_unused(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph, in order, without those whose outputs nothing uses."""
    used, kept = {port.name for port in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(used_by(node))
    return kept[::-1]
