"""Edits of a package's graphs in memory, and their execution in plain onnxruntime; weights stay in their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from vlpack.errors import PackageError
from vlpack.ort.session import ort, session_options

Array = npt.NDArray[Any]

MICROSOFT = "com.microsoft"


def load_graph(path: Path) -> ir.Model:
    """Read a graph without its weights, which stay in their files.

    Raises:
        PackageError: the file cannot be read.
    """
    try:
        return ir.load(path)
    except Exception as error:  # the errors of protobuf and onnx_ir have no common class
        raise PackageError(f"{path} cannot be read: {error}.") from None


def open_session(model: ir.Model, path: Path, threads: int, *, optimized: bool = True) -> ort.InferenceSession:
    """Open a session on the CPU provider for a graph that was read with `load_graph` and perhaps edited.

    Args:
        model: the graph.
        path: the file that the graph was read from; its folder contains the weights.
        threads: number of threads of the session.
        optimized: whether onnxruntime may fuse operators.

    Raises:
        PackageError: onnxruntime cannot load the graph.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        text = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise PackageError(f"onnxruntime cannot load {path}: {str(error)[:300]}") from None


def call(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session and return its outputs by name, without the cache.

    Inputs are cast to the graph's dtypes, and fp16 outputs to fp32.
    """
    types = {port.name: port.type for port in session.get_inputs()}
    given = {
        name: value.astype(np.float16)
        if types[name] == "tensor(float16)"
        else value.astype(np.float32)
        if types[name] == "tensor(float)"
        else value.astype(np.int8)
        if types[name] == "tensor(int8)"
        else value.astype(np.int64)
        for name, value in inputs.items()
    }
    names = [port.name for port in session.get_outputs() if not port.name.startswith("present.")]
    values = session.run(names, given)
    return {
        name: value.astype(np.float32) if value.dtype == np.float16 else value
        for name, value in zip(names, values, strict=True)
    }


def merge_equal_nodes(model: ir.Model) -> None:
    """Edit a graph so that nodes with the same operator, inputs and attributes become one, as in onnxruntime."""
    CommonSubexpressionEliminationPass()(model)


def empty_past(port: Any, batch: int, room: int = 0) -> Array:
    """The value of a decoder's input ``past_key_values.…`` before the first token: zeros of the port's dtype.

    Args:
        port: the input, as onnxruntime describes it.
        batch: number of sequences.
        room: number of tokens that keys and values have room for; states of linear attention have a fixed size.
    """
    dtype = np.int8 if port.type == "tensor(int8)" else np.float16 if port.type == "tensor(float16)" else np.float32
    return np.zeros([batch, *(size if isinstance(size, int) else room for size in port.shape[1:])], dtype)


def norm_input(graph: ir.Graph, weight: str) -> ir.Value:
    """The input of the norm that has the given weight.

    Raises:
        PackageError: the graph has no such norm.
    """
    value = graph.initializers.get(weight)
    consumers = [] if value is None else [use.node for use in value.uses()]
    if not consumers:
        raise PackageError(f"The graph {graph.name} has no norm with the weight {weight}.")
    node = consumers[0]
    if node.op_type == "Mul":  # an RMS norm in older operator sets: (x / sqrt(mean(x²) + eps)) · weight
        node = node.inputs[0].producer()  # type: ignore[union-attr,assignment]
    return node.inputs[0]  # type: ignore[return-value]


def compute_all_tokens(graph: ir.Graph) -> None:
    """Edit a decoder graph so that the last layer and the head compute all tokens, not only the last one.

    A graph without logits, or one that computes all tokens already, is not changed.
    """
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None:
        return
    logits.shape = ir.Shape(["batch_size", "sequence_length", logits.shape[-1]])  # type: ignore[index]
    for node in list(graph):
        if node.op_type == "Slice" and _takes_last(node):
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]


def compute_all_rows(graph: ir.Graph) -> None:
    """Makes the last layer of an embedding model's or reranker's decoder compute all tokens, not only each text's last.

    The nodes after the last norm are not valid any more.
    """
    for node in list(graph):
        if node.op_type == "GatherND":
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]


def _takes_last(node: ir.Node) -> bool:
    """Whether a Slice selects the last token, as `vlpack.layers.decoder.last_token` writes it: from -1 on, axis 1."""
    starts, axes = (value and value.const_value for value in (node.inputs[1], node.inputs[3]))
    return bool(starts and axes and starts.numpy().tolist() == [-1] and axes.numpy().tolist() == [1])


def make_exact(graph: ir.Graph) -> None:
    """Makes all matrix products use fp32 activations and dequantized weights."""
    for node in list(graph):
        if node.domain != MICROSOFT:
            continue
        if node.op_type in ("MatMulNBits", "QMoE") and "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        elif node.op_type == "MatMulIntegerToFloat":
            codes, weight, _, scales, _, *zeros = node.inputs
            x = codes.producer().inputs[0]  # type: ignore[union-attr] # what QuantizeLinear would round
            name, wide, product = node.name, ir.Value(name=f"{node.name}:weight"), ir.Value(name=f"{node.name}:exact")
            added = [ir.node("DequantizeLinear", [weight, scales], {"axis": 1}, outputs=[wide])]
            if zeros and zeros[0] is not None:  # one zero point for all, but the operator requires one for each
                each = ir.Value(name=f"{name}:zeros")
                size = ir.node("Shape", [scales], outputs=[ir.Value(name=f"{name}:size")])
                expand = ir.node("Expand", [zeros[0], size.outputs[0]], outputs=[each])
                added = [size, expand, ir.node("DequantizeLinear", [weight, scales, each], {"axis": 1}, outputs=[wide])]
            graph.insert_before(node, [*added, ir.node("MatMul", [x, wide], outputs=[product])])
            node.outputs[0].replace_all_uses_with(product)
            graph.remove(node, safe=True)
