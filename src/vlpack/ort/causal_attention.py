"""The causal attention of decoders in sessions with the operators of vlpack-kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper

ATTENTION = ("GroupQueryAttention", "NarrowGroupQueryAttention")
"""Operators of causal attention with a cache. The second one is the library's for a cache in bfloat16."""

INPUTS = 7
"""Number of inputs of the nodes that are replaced: queries, keys, values, past keys and values, and two lengths."""

QUANTIZED_PRODUCTS = ("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul")
"""Operators of products whose activations are 8-bit integers, besides MatMulNBits with ``accuracy_level`` 4."""


def replaced_attention(graph: onnx.GraphProto, instruction_set: str) -> list[onnx.NodeProto]:
    """The GroupQueryAttention nodes of a graph that the library's operator of the same name can replace.

    Only plain causal attention in fp32 is replaced: no rotary embedding inside, no window, no quantized cache. Products
    may be rounded to bfloat16 only where the graph rounds activations more than that, to 8 bits, in most products;
    otherwise the results stay those of fp32. The attributes are set to those of the library's operator.

    Args:
        graph: a graph with the types of its values; the nodes that are returned are edited in place.
        instruction_set: that of the library.
    """
    graphs = list(_with_branches(graph))
    nodes = [node for one in graphs for node in one.node if node.op_type == "GroupQueryAttention"]
    kinds = {value.name: value.type.tensor_type.elem_type for one in graphs for value in one.value_info}
    exact = sum(map(_is_quantized, graph.node)) < len(nodes)
    found: list[onnx.NodeProto] = []
    if instruction_set == "avx2":
        return found
    for node in nodes:
        attributes = _attributes(node)
        heads, key_heads = attributes.pop("num_heads", 0), attributes.pop("kv_num_heads", 0)
        scale = float(attributes.pop("scale", 0.0))
        plain = not attributes.pop("do_rotary", 0) and not attributes and all(node.input) and len(node.output) == 3
        if not (plain and len(node.input) == INPUTS and kinds.get(node.output[0]) == TensorProto.FLOAT):
            continue
        made = helper.make_node(
            node.op_type, [], [], num_heads=heads, kv_num_heads=key_heads, scale=scale, exact=int(exact)
        )
        del node.attribute[:]
        node.attribute.extend(made.attribute)
        found.append(node)
    return found


def narrowed_attention(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Those of the replaced nodes whose keys and values can be cached in bfloat16, which halves the time to read them.

    Where a graph rounds its activations to 8 bits, the operator rounds keys and values to bfloat16 in any case. The
    types of the graph's inputs and outputs for the cache are changed, and the attribute ``exact`` is removed.

    Args:
        graph: the graph; edited in place.
        nodes: nodes that `replaced_attention` returned.
    """
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name: value for value in graph.output}
    uses = Counter(name for one in _with_branches(graph) for node in one.node for name in node.input)
    found = []
    for node in nodes:
        past, present = node.input[3:5], node.output[1:3]
        exact = next(attribute for attribute in node.attribute if attribute.name == "exact")
        own = all(name in inputs and uses[name] == 1 for name in past) and all(
            name in outputs and uses[name] == 0 for name in present
        )
        if exact.i or not own:
            continue
        for value in [*(inputs[name] for name in past), *(outputs[name] for name in present)]:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        node.attribute.remove(exact)
        found.append(node)
    return found


def _with_branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields a graph and the branches of its If nodes, in which a graph with an int8 cache has its attention."""
    yield graph
    for node in graph.node:
        if node.op_type == "If":
            for attribute in node.attribute:
                yield from _with_branches(attribute.g)


def _is_quantized(node: onnx.NodeProto) -> bool:
    """Whether a node multiplies activations that are rounded to 8 bits."""
    return node.op_type in QUANTIZED_PRODUCTS or (
        node.op_type == "MatMulNBits" and _attributes(node).get("accuracy_level") == 4
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
