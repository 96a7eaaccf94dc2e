"""What a package's own files name must be the package's own files: a graph's weights, a configuration's graphs.

The runtime opens whatever they name. A package may come from anybody, and its manifest may be forged to match, so this
is looked at before the runtime is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from vlpack.errors import PackageError
from vlpack.safefile import quote

HINT = "vlpack writes no such package; do not use this one."


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
        try:
            model = onnx.load(folder / name, load_external_data=False)
        except Exception as error:  # protobuf's own kinds
            raise PackageError(f"{folder / name} cannot be read: {quote(str(error))}.", "Build it again.") from None
        for tensor in _tensors(model):
            place = {entry.key: entry.value for entry in tensor.external_data}
            location = place.get("location", "")
            if location not in files:
                raise PackageError(
                    f"{folder / name} takes the weight {quote(tensor.name)} from {quote(location)}, which is not a "
                    "file of the package.",
                    HINT,
                )


def check_config(where: Path, config: Any, files: Mapping[str, Any]) -> None:
    """Every file that a configuration for the runtime names, at any depth, is one of the package.

    Raises:
        PackageError: one is not.
    """
    for key, value in _entries(config):
        if key.endswith("filename") and value not in files:
            raise PackageError(f"{where} names the file {quote(value)}, which is not one of the package.", HINT)


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


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    dense = [*graph.initializer, *(part for s in graph.sparse_initializer for part in (s.values, s.indices))]
    yield from filter(uses_external_data, dense)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from filter(uses_external_data, [attribute.t, *attribute.tensors])
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from filter(uses_external_data, (sparse.values, sparse.indices))
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
