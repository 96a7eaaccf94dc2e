"""A package's graphs, changed in memory and run in plain onnxruntime; weights stay in the package's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.errors import PackageError
from vlpack.onnx_sessions import ort, session_options

Array = npt.NDArray[Any]

MICROSOFT = "com.microsoft"


def load_graph(path: Path) -> ir.Model:
    """A graph, its weights left in their files.

    Raises:
        PackageError: it cannot be read.
    """
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common class
        raise PackageError(f"{path} cannot be read: {error}.") from None


def open_session(model: ir.Model, path: Path, threads: int, *, optimized: bool = True) -> ort.InferenceSession:
    """A graph that was read from ``path``, as it stands now, on the CPU provider.

    Args:
        model: the graph.
        path: beside which its weights are.
        threads: of the session.
        optimized: let onnxruntime fuse operators.

    Raises:
        PackageError: onnxruntime cannot load it.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        text = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime, which has no common class either
        raise PackageError(f"onnxruntime cannot load {path}: {str(error)[:300]}") from None


def call(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs but the cache, floats as fp32 whatever the graph has."""
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


def normalized(graph: ir.Graph, weight: str) -> ir.Value:
    """What the norm with that weight is given.

    Raises:
        PackageError: there is no such norm.
    """
    value = graph.initializers.get(weight)
    consumers = [] if value is None else [use.node for use in value.uses()]
    if not consumers:
        raise PackageError(f"The graph {graph.name} has no norm with the weight {weight}.")
    node = consumers[0]
    if node.op_type == "Mul":  # written out, for older operator sets: (x / sqrt(mean(x²) + eps)) · weight
        node = node.inputs[0].producer()  # type: ignore[union-attr,assignment]
    return node.inputs[0]  # type: ignore[return-value]


def every_token(graph: ir.Graph) -> None:
    """Take away the choice of the last token, where there is one: the last layer and the head see all."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None:
        return
    logits.shape = ir.Shape(["batch_size", "sequence_length", logits.shape[-1]])  # type: ignore[index]
    for node in list(graph):
        if node.op_type == "Slice" and _takes_last(node):
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]


def _takes_last(node: ir.Node) -> bool:
    """Whether a Slice is `vlpack.layers.decoder.last_token`'s: from -1 on, along the tokens."""
    starts, axes = (value and value.const_value for value in (node.inputs[1], node.inputs[3]))
    return bool(starts and axes and starts.numpy().tolist() == [-1] and axes.numpy().tolist() == [1])


def make_exact(graph: ir.Graph) -> None:
    """Multiply by the weights in fp32, activations as they are."""
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
            if zeros and zeros[0] is not None:  # one for all, where the operator wants one for each
                each = ir.Value(name=f"{name}:zeros")
                size = ir.node("Shape", [scales], outputs=[ir.Value(name=f"{name}:size")])
                expand = ir.node("Expand", [zeros[0], size.outputs[0]], outputs=[each])
                added = [size, expand, ir.node("DequantizeLinear", [weight, scales, each], {"axis": 1}, outputs=[wide])]
            graph.insert_before(node, [*added, ir.node("MatMul", [x, wide], outputs=[product])])
            node.outputs[0].replace_all_uses_with(product)
            graph.remove(node, safe=True)
