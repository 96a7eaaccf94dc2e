"""The use of native operators of the optional distribution vlpack-kernels, in sessions that vlpack opens itself.

A graph is edited in memory when it is loaded: nodes for which the library has a faster operator on this processor are
replaced. The package's files do not change, and without the library, sessions run the original graph.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto, helper

from vlpack.errors import PackageError
from vlpack.ort.causal_attention import ATTENTION, narrowed_attention, replaced_attention
from vlpack.ort.products import use_products

DOMAIN = "vlpack"
"""Domain of the library's operators in a graph."""

SWITCH = "VLPACK_KERNELS"
"""Environment variable that turns the library off if it is ``0``."""

CHOICE = "VLPACK_KERNELS_ISA"
"""Environment variable that chooses one of the library's instruction sets."""

INTERFACE = 2
"""Number of the operators' interface: their names, inputs, outputs and attributes. It must be that of the library
(``kInterface`` in kernels/src/library.cpp), and every change of these raises both. A library without a number has 1."""


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
    """The operator library; None if it is not installed, is turned off or has no kernels for this processor.

    Raises:
        PackageError: the library does not belong to this version of vlpack, or has no kernels for the instruction set
            that `CHOICE` names on this processor.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        import vlpack_kernels
    except ImportError:
        return None
    found = vlpack_kernels.instruction_set()
    if found is None and os.environ.get(CHOICE):
        raise PackageError(
            f"vlpack-kernels has no kernels for {CHOICE}={os.environ[CHOICE]} on this processor.",
            f"Give avx512_bf16, avx512 or avx2, whichever the processor has, or remove {CHOICE}.",
        )
    if found is None:
        return None
    interface = getattr(vlpack_kernels, "interface", lambda: 1)()
    if interface != INTERFACE:
        raise PackageError(
            f"The installed vlpack-kernels is {'older' if interface < INTERFACE else 'newer'} than this vlpack "
            f"(interface {interface} of the operators; {INTERFACE} is needed).",
            "Install it again from the source of this version of vlpack (pip install ./kernels), or turn it off with "
            f"{SWITCH}=0 (on the command line also with vlpack --no-kernels).",
        )
    return Library(str(vlpack_kernels.library()), str(found))


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
        if kinds.get(node.output[0]) == TensorProto.FLOAT and _replaces_attention(node, available.instruction_set):
            used[node.op_type] += 1
    if available.instruction_set != "avx2":  # products of bytes are faster with VNNI
        used += use_products(model, DOMAIN)
    if used:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return used


def kernel_counts(graph: Path) -> dict[str, int]:
    """The number of nodes of a graph file that the library's operators replace on this machine, by operator.

    Raises:
        PackageError: the file cannot be read, or the library does not belong to this version of vlpack.
    """
    return dict(use_kernels(read_graph(graph), library()))


def _replaces_attention(node: onnx.NodeProto, instruction_set: str) -> bool:
    """Replaces MultiHeadAttention without a mask by Attention, which is faster where products are in bfloat16."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    scale, heads = float(attributes.pop("scale", 0.0)), attributes.pop("num_heads", 0)
    plain = len(node.input) == 3 and len(node.output) == 1 and not attributes and heads
    if (node.domain, node.op_type) != ("com.microsoft", "MultiHeadAttention") or not plain:
        return False
    if instruction_set != "avx512_bf16":
        return False
    node.op_type, node.domain = "Attention", DOMAIN
    del node.attribute[:]
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in [("num_heads", heads), ("scale", scale)]
    )
    return True
