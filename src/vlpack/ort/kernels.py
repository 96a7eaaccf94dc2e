"""The use of native operators of the optional distribution vlpack-kernels, in sessions that vlpack opens itself.

A graph is edited in memory when it is loaded: nodes for which the library has a faster operator on this processor are
replaced. The package's files do not change, and without the library, sessions run the original graph.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, helper

from vlpack.errors import PackageError
from vlpack.ort.causal_attention import ATTENTION, narrowed_attention, replaced_attention
from vlpack.ort.linear8 import use_linear8

DOMAIN = "vlpack"
"""Domain of the library's operators in a graph."""

SWITCH = "VLPACK_KERNELS"
"""Environment variable that turns the library off if it is ``0``."""


opened: Counter[str] = Counter()
"""Number of nodes that operators of the library replaced in the sessions that this process has opened, by operator."""


class Library(NamedTuple):
    """The installed operator library.

    Attributes:
        path: path of the shared library.
        instruction_set: ``avx512_bf16``, ``avx512`` or ``avx2``.
    """

    path: str
    instruction_set: str


def library() -> Library | None:
    """The operator library; None if it is not installed, is turned off or has no kernels for this processor."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        import vlpack_kernels
    except ImportError:
        return None
    found = vlpack_kernels.instruction_set()
    return None if found is None else Library(str(vlpack_kernels.library()), str(found))


def read_graph(path: Path) -> onnx.ModelProto:
    """Reads a graph without its weights, which stay in their files.

    Raises:
        PackageError: the file cannot be read.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own error classes
        raise PackageError(f"{path} cannot be read: {str(error)[:300]}") from error


def use_kernels(model: onnx.ModelProto, available: Library | None) -> Counter[str]:
    """Replaces the nodes of a graph for which the library has a faster operator; weights stay in their files.

    Args:
        model: a graph with the types of its values, as vlpack writes it; edited in place.
        available: the operator library, or None to change nothing.

    Returns:
        The number of replaced nodes, by the names of the operators that replaced them.
    """
    used: Counter[str] = Counter()
    if available is None:
        return used
    attention = replaced_attention(model.graph, available.instruction_set)
    if available.instruction_set == "avx512_bf16":
        for node in narrowed_attention(model.graph, attention):
            node.op_type = ATTENTION[1]
    for node in attention:
        node.domain = DOMAIN
        used[node.op_type] += 1
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.domain == "com.microsoft" and kinds.get(node.output[0]) == TensorProto.FLOAT:
            replace = _REPLACE.get(node.op_type)
            if replace is not None and replace(node, available.instruction_set):
                node.domain = DOMAIN
                used[node.op_type] += 1
    if available.instruction_set != "avx2":  # products of bytes are faster with VNNI
        used += use_linear8(model, DOMAIN)
    if used:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return used


def kernel_counts(graph: Path) -> dict[str, int]:
    """The number of nodes of a graph file that the library's operators replace on this machine, by operator.

    Raises:
        PackageError: the file cannot be read.
    """
    return dict(use_kernels(read_graph(graph), library()))


def _attention(node: onnx.NodeProto, instruction_set: str) -> bool:
    """Replaces MultiHeadAttention without a mask by Attention, which is faster where products are in bfloat16."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    scale = attributes.pop("scale", 0.0)
    heads = attributes.pop("num_heads", 0)
    if instruction_set != "avx512_bf16" or len(node.input) != 3 or len(node.output) != 1 or attributes or not heads:
        return False
    _rename(node, "Attention", num_heads=heads, scale=float(scale))
    return True


def _linear4(node: onnx.NodeProto, instruction_set: str) -> bool:
    """Replaces MatMulNBits with 4-bit weights and 8-bit activations by Linear4, which is faster with VNNI."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    sizes = {name: attributes.pop(name, 0) for name in ("K", "N", "block_size")}
    quantized = (attributes.pop("bits", 4), attributes.pop("accuracy_level", 0)) == (4, 4)
    if instruction_set == "avx2" or not quantized or attributes or len(node.input) > 4:
        return False
    _rename(node, "Linear4", **sizes)
    return True


def _rename(node: onnx.NodeProto, operator: str, **attributes: Any) -> None:
    """Changes the operator and all attributes of a node."""
    node.op_type = operator
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())


_REPLACE: dict[str, Callable[[onnx.NodeProto, str], bool]] = {
    "MultiHeadAttention": _attention,
    "MatMulNBits": _linear4,
}
"""For each operator of com.microsoft that may be replaced: a function that edits a node in place and returns True, or
leaves it unchanged and returns False."""
