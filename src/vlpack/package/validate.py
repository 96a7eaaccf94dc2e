"""What a package's own files name must be the package's own files: a graph's weights, a configuration's graphs.

The runtime opens whatever they name, and does what its configuration asks for. A package may come from anybody, and its
manifest may be forged to match, so this is looked at before the runtime is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpack.checkpoint.files import quote
from vlpack.errors import PackageError

if TYPE_CHECKING:
    import onnx

HINT = "vlpack writes no such package; do not use this one."

MAX_GRAPH_BYTES = 1 << 27
"""Largest graph that is read, 128 MiB; a 2B's are below 1 MB, as weights lie beside them."""

SECTIONS = frozenset({"decoder", "vision", "embedding"})
"""Of a configuration's model: those that vlpack writes. The runtime knows others, which open files of theirs."""

SESSION_OPTIONS = frozenset(
    {
        *("log_id", "log_severity_level", "intra_op_num_threads", "inter_op_num_threads", "provider_options"),
        *("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"),
    }
)
"""What a package may ask of onnxruntime. Others write files anywhere (a profile, say) or load libraries."""

PROVIDERS = frozenset({"cpu", "cuda", "dml", "webgpu"})
PROVIDER_OPTIONS = frozenset({"device_id"})
"""Likewise of a provider, whose options can be paths and even addresses in memory."""


def check_graphs(folder: Path, graphs: Mapping[str, str], files: Mapping[str, Any]) -> None:
    """Every weight of every graph lies in a file of the package.

    Args:
        folder: the package.
        graphs: part → file name.
        files: the manifest's.

    Raises:
        PackageError: one does not, or a graph cannot be read.
    """
    for name in graphs.values():
        size = (folder / name).stat().st_size
        if size > MAX_GRAPH_BYTES:
            raise PackageError(f"{folder / name} has {size} bytes; more than {MAX_GRAPH_BYTES} are not read.", HINT)
        for tensor, location in _weights(folder / name):
            if location not in files:
                raise PackageError(
                    f"{folder / name} takes the weight {quote(tensor)} from {quote(location)}, which is not "
                    "a file of the package.",
                    HINT,
                )


def weight_files(graph: Path) -> set[str]:
    """Names of the files that hold a graph's weights.

    Raises:
        PackageError: the graph cannot be read.
    """
    return {location for _, location in _weights(graph)}


def _weights(graph: Path) -> Iterator[tuple[str, str]]:
    """Each weight that lies outside of the graph's file, and in which file: all that are named, as of several another
    reader may take another one.
    """
    import onnx  # late, as a folder that is no package should be told at once

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's own kinds
        raise PackageError(f"{graph} cannot be read: {quote(str(error))}.", "Build it again.") from None
    for tensor in _tensors(model):
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        for location in locations or [""]:
            yield tensor.name, location


def check_config(where: Path, config: Any, files: Mapping[str, Any], graphs: Mapping[str, str]) -> None:
    """A configuration for the runtime names files of the package alone, at any depth, and asks for nothing odd.

    Args:
        where: the file, for messages.
        config: what is in it; None where a package has none.
        files: the manifest's.
        graphs: part → file name, of those that `check_graphs` has looked into.

    Raises:
        PackageError: it does not.
    """
    for key, value in _entries(config):
        if key.endswith("filename"):
            # as a graph, only one that was looked into
            if not isinstance(value, str) or value not in (graphs.values() if key == "filename" else files):
                raise PackageError(f"{where} names the file {quote(value)}, which is not one of the package.", HINT)
        elif "library" in key.lower():
            raise PackageError(f"{where} asks to load a library ({quote(key)}), whose code would run.", HINT)
        elif key == "session_options":
            _check_session(where, value)
        elif key == "run_options" and value:
            raise _odd(where, key)
    model = config.get("model") if isinstance(config, dict) else None
    for key, value in (model if isinstance(model, dict) else {}).items():
        if key not in SECTIONS and (isinstance(value, dict) or (isinstance(value, list) and key != "eos_token_id")):
            raise _odd(where, key)


def _check_session(where: Path, options: Any) -> None:
    if not isinstance(options, dict):
        raise _odd(where, "session_options")
    for key in options.keys() - SESSION_OPTIONS:
        raise _odd(where, key)
    providers = options.get("provider_options", [])
    if not isinstance(providers, list) or not all(isinstance(provider, dict) for provider in providers):
        raise _odd(where, "provider_options")
    for provider in providers:
        for name, values in provider.items():
            if name.lower() not in PROVIDERS or not isinstance(values, dict):
                raise _odd(where, name)
            for key in values.keys() - PROVIDER_OPTIONS:
                raise _odd(where, key)


def _odd(where: Path, name: str) -> PackageError:
    return PackageError(f"{where} asks the runtime for {quote(name)}, which packages do not need.", HINT)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Those that lie outside of the graph's file, in nodes' attributes, subgraphs and functions too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)


def _lies_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    dense = [*graph.initializer, *(part for s in graph.sparse_initializer for part in (s.values, s.indices))]
    yield from filter(_lies_outside, dense)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Any) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from filter(_lies_outside, [attribute.t, *attribute.tensors])
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from filter(_lies_outside, (sparse.values, sparse.indices))
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)
