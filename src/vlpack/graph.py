"""A part's module tree as an ONNX graph, and the list of weights that its initializers want."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

import vlpack
from vlpack.architectures.base import Part
from vlpack.layers import ops
from vlpack.layers.linear import Linear, Stored
from vlpack.precision import VISION_PREFIX, Policy
from vlpack.storage import Float, Storage

OPSET = {"cpu": 23}
"""Operator set by execution provider. The CPU's is the first with RMSNormalization; the others' kernels are registered
per version and lag behind, so they get the older `OLD_OPSET`."""
OLD_OPSET = 21


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One weight of a graph: where it comes from, how it is stored, and the initializers it fills.

    ``sources`` lie one above the other; together they are ``rows × cols``.
    """

    path: str
    sources: tuple[Source, ...]
    rows: int
    cols: int
    storage: Storage
    parameters: dict[str, nn.Parameter]


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


def declare(module: nn.Module, policy: Policy) -> list[Weight]:
    """Give every `Stored` module its storage, and list all weights in the order of the tree."""
    weights = []
    for path, child in walk(module, module.name or ""):
        if isinstance(child, Stored):
            storage = policy.storage(path)
            sources = _sources(path, child)
            weights.append(Weight(path, sources, child.rows, child.cols, storage, child.store(storage)))
            if isinstance(child, Linear) and child.bias is not None:
                parts = tuple(Source(s.name.removesuffix("weight") + "bias", s.shape[:1]) for s in sources)
                weights.append(_vector(f"{path}.bias", parts, child.bias))
        else:
            for name, parameter in child.named_parameters(recurse=False):
                source = Source(f"{path}.{name}", parameter_shape(parameter))
                weights.append(_vector(f"{path}.{name}", (source,), parameter))
    return weights


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, whose dimensions are all known."""
    return tuple(ops.shape_of(parameter).numpy())


def _vector(path: str, sources: tuple[Source, ...], parameter: nn.Parameter) -> Weight:
    """A norm's weight or a bias: fp32 in every precision."""
    rows = int(np.prod(parameter_shape(parameter)))
    return Weight(path, sources, rows, 1, Float("float32"), {"weight": parameter})


def _sources(path: str, module: Stored) -> tuple[Source, ...]:
    if module.tied_to:
        return (Source(module.tied_to, (module.rows, module.cols)),)
    if module.stacked:
        parent = path.rpartition(".")[0]
        return tuple(Source(f"{parent}.{name}.weight", (rows, module.cols)) for name, rows in module.stacked)
    return (Source(f"{path}.weight", module.source_shape),)


def trace(part: Part, policy: Policy) -> Graph:
    """Write the graph of ``part``: its weights are declared by ``policy`` and still empty."""
    if part.name == "vision" and part.module.name != VISION_PREFIX:
        raise AssertionError(
            f"the vision encoder's module is named {part.module.name}; the policy knows {VISION_PREFIX}"
        )
    weights = declare(part.module, policy)
    graph = ir.Graph(
        [], [], nodes=[], opset_imports={"": OPSET.get(policy.provider, OLD_OPSET), "com.microsoft": 1}, name=part.name
    )
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
