"""Traces a part's module tree to an ONNX graph, and lists the weights that fill the graph's initializers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from vlpack.architectures.ports import Part
from vlpack.checkpoint.rows import Rows, Shifted, Source, stacked
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels, RowChannels
from vlpack.layers.linear import Linear, Stored
from vlpack.quantize.policy import Policy
from vlpack.quantize.rotate import rotation_size
from vlpack.quantize.storage import Blocks, ChannelInt8, Float, RowReader, Storage, is_kept
from vlpack.quantize.transforms import IDENTITY, Channels, ChannelScales, Transform
from vlpack.version import __version__

if TYPE_CHECKING:
    from vlpack.checkpoint.checkpoint import Checkpoint

OPSET = {"cpu": 23}
"""ONNX operator set by execution provider. 23 is the first with RMSNormalization. The kernels of other providers are
registered per version and lag behind, so those get `OLD_OPSET`."""
OLD_OPSET = 21
"""ONNX operator set of all providers that `OPSET` does not list."""

VECTOR = Float("float32")
"""Storage of norms and biases, in every precision."""

INT8_KV_CACHE_OPSET = 24
"""ONNX operator set of graphs with an int8 KV cache: the first with TensorScatter, which writes into that cache."""


WeightKey = tuple[Rows, Storage, Transform]
"""Source, storage and transform of a weight; weights with equal keys have equal bytes."""


@dataclass(frozen=True)
class Weight:
    """One weight ``[rows, cols]`` of a graph, with its place in the checkpoint and its storage in the package.

    Args:
        path: path of the module or parameter, unique in the graph.
        source: the rows of the checkpoint that it is made from.
        storage: the format in which it is stored.
        parameters: the initializers that it fills: name of the stored array → parameter.
        transform: balancing and rotation between reading and storing.
        experts: number of experts whose matrices are stacked in it, each with inputs of its own; 1 for other weights.
        role: its role for the policy; empty for vectors, which all have the same storage.
    """

    path: str
    source: Rows
    storage: Storage
    parameters: dict[str, nn.Parameter]
    transform: Transform = IDENTITY
    experts: int = 1
    role: str = ""

    @property
    def rows(self) -> int:
        """Number of rows: output features, entries of an embedding, or length of a vector."""
        return self.source.rows

    @property
    def cols(self) -> int:
        """Number of columns: input features, width of an embedding, or 1 for a vector."""
        return self.source.cols

    @property
    def calibrated(self) -> bool:
        """Whether the weight is quantized with calibration, for measured inputs."""
        return isinstance(self.storage, Blocks | ChannelInt8) and self.storage.calibrated

    @property
    def key(self) -> WeightKey:
        """A key that is equal for weights whose stored bytes are equal."""
        return self.source, self.storage, self.transform

    def reader(self, checkpoint: Checkpoint, scales: ChannelScales) -> RowReader:
        """Returns a function that reads rows of the weight, transformed but not yet rounded."""
        return self.transform.reader(partial(self.source.read, checkpoint), scales)


@dataclass(frozen=True)
class Graph:
    """The ONNX graph of one part, and its weights."""

    name: str
    model: ir.Model
    weights: list[Weight]


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields ``module`` and all modules below it, with paths. The names of a list's items include the list's name."""
    yield path, module
    for child in module.children():
        own = "" if isinstance(child, nn.ModuleList) else child.name or ""
        yield from walk(child, ".".join(part for part in (path, own) if part))


def declare(part: Part, policy: Policy) -> list[Weight]:
    """Gives every `Stored` module its storage and rotation, and lists all weights in the order of the module tree."""
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
            sources[child] = parameter_source(child, path, "weight")
    transforms = plan_transforms([child for _, child in modules], sources, policy)
    weights = []
    for path, child in modules:
        transform = transforms.get(child, IDENTITY)
        if isinstance(child, Stored):
            storage = child.storage
            assert storage is not None, "it was given one above"
            if isinstance(storage, Blocks):
                storage = replace(storage, rotated=transform.input_rotation > 1)
            role = f"{part.side}.{child.role}"
            weights.append(Weight(path, sources[child], storage, parameters[child], transform, child.experts, role))
            if isinstance(child, Linear) and child.bias is not None:
                tensors = sources[child].tensors()
                biases = (Source(s.name.removesuffix("weight") + "bias", s.shape[:1]) for s in tensors)
                weights.append(
                    Weight(f"{path}.bias", stacked(biases), VECTOR, {"weight": child.bias}, transform.of_vector)
                )
        else:
            for name, parameter in child.named_parameters(recurse=False):
                vector = parameter_source(child, path, name)
                weights.append(Weight(f"{path}.{name}", vector, VECTOR, {"weight": parameter}, transform))
    return weights


def plan_transforms(
    modules: Sequence[nn.Module], sources: Mapping[nn.Module, Rows], policy: Policy
) -> dict[nn.Module, Transform]:
    """Plans the transform (balancing and rotation) of each module's weight, and sets the modules' rotations.

    Args:
        modules: all modules of a part, with their storages chosen.
        sources: module → the rows of its weight in the checkpoint.
        policy: the precision policy, which decides what is balanced and rotated.

    Returns:
        Module → transform. The weights of other modules are stored without one.
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
            if any(is_kept(getattr(one, "storage", None)) for one in (producer, *readers)):
                continue  # the codes of a quantized checkpoint are stored as they are
            reader_sources = tuple(sources[reader] for reader in readers)
            if tolerances := [t for reader in readers if (t := policy.balance(reader.storage)) is not None]:
                tolerance = max(tolerances) or None
                channels = Channels(sources[producer], first, reader_sources, shape, tolerance)
                change(producer, writes=channels, first=first, count=channels.count)
                for reader in readers:
                    change(reader, reads=channels)
            if isinstance(link, RowChannels) and link.mixes and link.reader.rotation > 1:
                # this rotation is in the weights alone and free at run time, so blocks are as large as possible
                size = rotation_size(shape[2], shape[2])
                change(producer, output_rotation=size, first=first, count=shape[0] * shape[2])
                change(link.reader, input_rotation=size)
                link.reader.rotation = 1
    return plans


def parameter_source(module: nn.Module, path: str, name: str) -> Rows:
    """The rows of a bare parameter: the checkpoint's tensor of that name, plus the module's ``offset``, if any."""
    source = Source(f"{path}.{name}", parameter_shape(dict(module.named_parameters(recurse=False))[name]))
    offset = getattr(module, "offset", 0.0)
    return Shifted(source, offset) if offset else source


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter; all its dimensions are known."""
    return tuple(ops.shape_of(parameter).numpy())


def trace(part: Part, policy: Policy) -> Graph:
    """Traces the graph of a part. Its weights are declared as ``policy`` says; they have no values yet."""
    weights = declare(part, policy)
    opset = OPSET.get(policy.provider, OLD_OPSET)
    if any(port.dtype == ir.DataType.INT8 for port in part.inputs):
        opset = INT8_KV_CACHE_OPSET
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name=part.name)
    builder = GraphBuilder(graph)
    inputs = [builder.input(port.name, port.dtype, list(port.shape)) for port in part.inputs]
    outputs = part.module(builder.op, *inputs)
    for value, port in zip(outputs, part.outputs, strict=True):
        named = builder.op.Identity(value) if value.is_graph_input() else value
        named.dtype, named.shape = port.dtype, ir.Shape(port.shape)
        builder.add_output(named, port.name)
    for node in graph:
        node.metadata_props.clear()  # module scopes, which the nodes' names already contain
    model = ir.Model(graph, ir_version=10, producer_name="vlpack", producer_version=__version__)
    return Graph(part.name, model, weights)
