"""A part's module tree as an ONNX graph, and the list of weights that its initializers want."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

import vlpack
from vlpack.architectures.base import Part
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels, RowChannels
from vlpack.layers.linear import Linear, Stored
from vlpack.precision import Policy
from vlpack.quantize.rotate import rotation_size
from vlpack.sources import Rows, Source, stacked
from vlpack.storage import Blocks, ChannelInt8, Float, RowReader, Storage
from vlpack.transforms import IDENTITY, Channels, ChannelScales, Transform

if TYPE_CHECKING:
    from vlpack.checkpoint import Checkpoint

OPSET = {"cpu": 23}
"""Operator set by execution provider. The CPU's is the first with RMSNormalization; the others' kernels are registered
per version and lag behind, so they get the older `OLD_OPSET`."""
OLD_OPSET = 21

VECTOR = Float("float32")
"""How norms and biases are stored, in every precision."""

BYTE_CACHE_OPSET = 24
"""The first operator set with TensorScatter, which writes into a cache of 8 bits."""


WeightKey = tuple[Rows, Storage, Transform]


@dataclass(frozen=True)
class Weight:
    """One weight ``[rows, cols]`` of a graph: where it comes from, how it is stored, which initializers it fills.

    ``transform`` is what is done to it between reading and storing. Where there are several ``experts``, it is their
    matrices above each other, each of which has inputs of its own.
    """

    path: str
    source: Rows
    storage: Storage
    parameters: dict[str, nn.Parameter]
    transform: Transform = IDENTITY
    experts: int = 1

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
        return isinstance(self.storage, Blocks | ChannelInt8) and self.storage.calibrated

    @property
    def key(self) -> WeightKey:
        """Equal for weights that are the same bytes."""
        return self.source, self.storage, self.transform

    def reader(self, checkpoint: Checkpoint, scales: ChannelScales) -> RowReader:
        """Reads rows of the weight as they are stored, but for rounding."""
        return self.transform.reader(partial(self.source.read, checkpoint), scales)


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
    """Give every `Stored` module its storage and rotation, and list all weights in the order of the tree."""
    modules = list(walk(part.module, part.module.name or ""))
    sources: dict[nn.Module, Rows] = {}
    parameters: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for path, child in modules:
        if isinstance(child, Stored):
            chosen = policy.storage(f"{part.side}.{child.role}", path)
            sources[child] = source = child.source(path)
            assert (source.rows, source.cols) == (child.rows, child.cols), path
            parameters[child] = child.store(chosen)
        elif "weight" in dict(child.named_parameters(recurse=False)):
            sources[child] = Source(f"{path}.weight", parameter_shape(dict(child.named_parameters())["weight"]))
    transforms = plan_transforms([child for _, child in modules], sources, policy)
    weights = []
    for path, child in modules:
        transform = transforms.get(child, IDENTITY)
        if isinstance(child, Stored):
            storage = child.storage
            assert storage is not None, "it was given one above"
            if isinstance(storage, Blocks):
                storage = replace(storage, rotated=transform.input_rotation > 1)
            weights.append(Weight(path, sources[child], storage, parameters[child], transform, child.experts))
            if isinstance(child, Linear) and child.bias is not None:
                tensors = sources[child].tensors()
                biases = (Source(s.name.removesuffix("weight") + "bias", s.shape[:1]) for s in tensors)
                weights.append(
                    Weight(f"{path}.bias", stacked(biases), VECTOR, {"weight": child.bias}, transform.of_vector)
                )
        else:
            for name, parameter in child.named_parameters(recurse=False):
                vector = Source(f"{path}.{name}", parameter_shape(parameter))
                weights.append(Weight(vector.name, vector, VECTOR, {"weight": parameter}, transform))
    return weights


def plan_transforms(
    modules: Sequence[nn.Module], sources: Mapping[nn.Module, Rows], policy: Policy
) -> dict[nn.Module, Transform]:
    """What is done to the weight of each module, the modules' rotations set; those that are not named stay as they are.

    Args:
        modules: all of a part, their storages chosen.
        sources: where the weight of each lies in the checkpoint.
        policy: says which are balanced and rotated.
    """
    plans: dict[nn.Module, Transform] = {}

    def change(module: nn.Module, **fields: Any) -> None:
        plans[module] = replace(plans.get(module, IDENTITY), **fields)

    for module in modules:
        if isinstance(module, Stored) and module.can_rotate:
            module.rotation = policy.rotation(module.storage, module.cols)
            change(module, input_rotation=module.rotation)
    for module in modules:
        for link in module.channels() if hasattr(module, "channels") else ():
            if isinstance(link, NormChannels):
                count = sources[link.norm].rows
                producer, first, readers, shape = link.norm, 0, link.readers, (1, link.repeats, count)
            else:
                producer, first, readers, shape = link.producer, link.first, [link.reader], link.shape
            reader_sources = tuple(sources[reader] for reader in readers)
            if tolerances := [t for reader in readers if (t := policy.balance(reader.storage)) is not None]:
                tolerance = max(tolerances) or None
                channels = Channels(sources[producer], first, reader_sources, shape, tolerance)
                change(producer, writes=channels, first=first, count=channels.count)
                for reader in readers:
                    change(reader, reads=channels)
            if isinstance(link, RowChannels) and link.mixes and link.reader.rotation > 1:
                # in the weights alone, and so as large as a block may be
                size = rotation_size(shape[2], shape[2])
                change(producer, output_rotation=size, first=first, count=shape[0] * shape[2])
                change(link.reader, input_rotation=size)
                link.reader.rotation = 1
    return plans


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
