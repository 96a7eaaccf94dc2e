"""A part's module tree as an ONNX graph, and the list of weights that its initializers want."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

import vlpack
from vlpack.architectures.base import Part
from vlpack.layers import ops
from vlpack.layers.linear import Linear, Stored
from vlpack.precision import Policy
from vlpack.sources import Rows, Source, stacked
from vlpack.storage import Blocks, Float, Storage

OPSET = {"cpu": 23}
"""Operator set by execution provider. The CPU's is the first with RMSNormalization; the others' kernels are registered
per version and lag behind, so they get the older `OLD_OPSET`."""
OLD_OPSET = 21

VECTOR = Float("float32")
"""How norms and biases are stored, in every precision."""

BYTE_CACHE_OPSET = 24
"""The first operator set with TensorScatter, which writes into a cache of 8 bits."""


@dataclass(frozen=True)
class Weight:
    """One weight ``[rows, cols]`` of a graph: where it comes from, how it is stored, which initializers it fills."""

    path: str
    source: Rows
    storage: Storage
    parameters: dict[str, nn.Parameter]

    @property
    def rows(self) -> int:
        """Output features, entries of a table, or the length of a vector."""
        return self.source.rows

    @property
    def cols(self) -> int:
        """Input features, the width of a table, or 1."""
        return self.source.cols

    @property
    def calibrated(self) -> bool:
        """Whether it is rounded for the inputs that it meets."""
        return isinstance(self.storage, Blocks) and self.storage.calibrated

    @property
    def key(self) -> tuple[Rows, Storage]:
        """Equal for weights that are the same bytes."""
        return self.source, self.storage


@dataclass(frozen=True)
class Graph:
    """A traced part."""

    name: str
    model: ir.Model
    weights: list[Weight]


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``module`` with its path; a list's items already carry the list's name."""
    yield path, module
    for child in module.children():
        own = "" if isinstance(child, nn.ModuleList) else child.name or ""
        yield from walk(child, ".".join(part for part in (path, own) if part))


def declare(part: Part, policy: Policy) -> list[Weight]:
    """Give every `Stored` module its storage, and list all weights in the order of the tree."""
    weights = []
    for path, child in walk(part.module, part.module.name or ""):
        if isinstance(child, Stored):
            storage = policy.storage(f"{part.side}.{child.role}", path)
            source = child.source(path)
            assert (source.rows, source.cols) == (child.rows, child.cols), path
            weights.append(Weight(path, source, storage, child.store(storage)))
            if isinstance(child, Linear) and child.bias is not None:
                biases = (Source(s.name.removesuffix("weight") + "bias", s.shape[:1]) for s in source.tensors())
                weights.append(Weight(f"{path}.bias", stacked(biases), VECTOR, {"weight": child.bias}))
        else:
            for name, parameter in child.named_parameters(recurse=False):
                vector = Source(f"{path}.{name}", parameter_shape(parameter))
                weights.append(Weight(vector.name, vector, VECTOR, {"weight": parameter}))
    return weights


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, whose dimensions are all known."""
    return tuple(ops.shape_of(parameter).numpy())


def trace(part: Part, policy: Policy) -> Graph:
    """Write the graph of ``part``: its weights are declared by ``policy`` and still empty."""
    weights = declare(part, policy)
    opset = OPSET.get(policy.provider, OLD_OPSET)
    if any(port.dtype == ir.DataType.INT8 for port in part.inputs):
        opset = BYTE_CACHE_OPSET
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name=part.name)
    builder = GraphBuilder(graph)
    inputs = [builder.input(port.name, port.dtype, list(port.shape)) for port in part.inputs]
    outputs = part.module(builder.op, *inputs)
    for value, port in zip(outputs, part.outputs, strict=True):
        named = builder.op.Identity(value) if value.is_graph_input() else value
        named.dtype, named.shape = port.dtype, ir.Shape(port.shape)
        builder.add_output(named, port.name)
    for node in graph:
        node.metadata_props.clear()  # scopes, which the nodes' names say already
    model = ir.Model(graph, ir_version=10, producer_name="vlpack", producer_version=vlpack.__version__)
    return Graph(part.name, model, weights)
