"""Checks that a package refers only to its own files: weights named in a graph, graphs named in a configuration.

The runtime opens every file that they name and obeys its configuration. A package is untrusted, and its manifest may be
forged to match, so these checks run before the runtime opens anything.
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
"""Largest graph file that is read, 128 MiB; those of a 2B model have less than 1 MB, as weights are in other files."""

SECTIONS = frozenset({"decoder", "vision", "embedding"})
"""Allowed sections of a configuration's ``model``, those that vlpack writes. Others may open more files."""

SESSION_OPTIONS = frozenset(
    {
        *("log_id", "log_severity_level", "intra_op_num_threads", "inter_op_num_threads", "provider_options"),
        *("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"),
    }
)
"""Allowed session options of onnxruntime. Others may write files anywhere (such as a profile) or load libraries."""

PROVIDERS = frozenset({"cpu", "cuda", "dml", "webgpu"})
"""Allowed execution providers."""
PROVIDER_OPTIONS = frozenset({"device_id"})
"""Allowed options of an execution provider. Others can be paths and even addresses in memory."""


def check_graphs(folder: Path, graphs: Mapping[str, str], files: Mapping[str, Any]) -> None:
    """Checks that all external weights of all graphs lie in files of the package.

    Args:
        folder: the package's folder.
        graphs: part → file name of its graph.
        files: the files that the manifest lists, by name.

    Raises:
        PackageError: a weight is outside of the package, or a graph is too large or cannot be read.
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
    """Names of the external files that hold a graph's weights.

    Raises:
        PackageError: the graph cannot be read.
    """
    return {location for _, location in _weights(graph)}


def _weights(graph: Path) -> Iterator[tuple[str, str]]:
    """Name and file of each external weight. If a weight names several files, all are given: programs differ in which
    of them they read.
    """
    import onnx  # imported late, so that a folder that is not a package is reported without this delay

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf has its own exception types
        raise PackageError(f"{graph} cannot be read: {quote(str(error))}.", "Build the package again.") from None
    for tensor in _tensors(model):
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        for location in locations or [""]:
            yield tensor.name, location


def check_config(where: Path, config: Any, files: Mapping[str, Any], graphs: Mapping[str, str]) -> None:
    """Checks that a configuration of the runtime names, at any depth, only files of the package and allowed options.

    Args:
        where: path of the configuration, for messages.
        config: the parsed JSON; None if the package has no configuration.
        files: the files that the manifest lists, by name.
        graphs: part → file name, for the graphs that `check_graphs` has accepted.

    Raises:
        PackageError: the configuration names another file, loads a library, or uses an option that is not allowed.
    """
    for key, value in _entries(config):
        if key.endswith("filename"):
            # "filename" alone names a graph, which must be one that was checked
            if not isinstance(value, str) or value not in (graphs.values() if key == "filename" else files):
                raise PackageError(f"{where} names the file {quote(value)}, which is not a file of the package.", HINT)
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
    """All tensors of a model with external data, also those in nodes' attributes, subgraphs and functions."""
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
