"""Writes the manifest ``vlpack.json``: a package's origin, the storage of each weight, and the hash of every file.

It contains no time and no path, so that the same source, options and versions give the same bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import sha256_file
from vlpack.export.graph import Graph, Weight
from vlpack.package.manifest import FORMAT, MANIFEST, sealed
from vlpack.quantize.policy import Policy
from vlpack.tasks import GENERATE
from vlpack.version import __version__


def write_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    source_sha256: Mapping[str, str],
    policy: Policy,
    graphs: Mapping[str, Graph],
    known_sha256: Mapping[str, str],
    task: str = GENERATE,
    encoder: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    imported: Mapping[str, Any] | None = None,
) -> None:
    """Writes the manifest, the last file of a package, and hashes the files whose hash is not known yet.

    Args:
        folder: the package's folder.
        checkpoint: the checkpoint that the package was built from.
        source: the checkpoint's origin: ``repo_id`` and ``commit``, or the folder's ``name``.
        source_sha256: file name → SHA-256 of each of the checkpoint's files.
        policy: the precision policy.
        graphs: file name → graph.
        known_sha256: file name → SHA-256 that was computed while the file was written.
        task: one of `vlpack.tasks.TASKS`.
        encoder: result of `encoder_section` for an embedding model or reranker; None for a model that generates.
        calibration: description of the calibration; None without one.
        imported: description of a quantized checkpoint and of what became of its matrices; None for other checkpoints.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    written: dict[tuple[str, int], str] = {}
    manifest = {
        "format": FORMAT,
        "vlpack": __version__,
        "versions": {name: version(name) for name in ("onnx-ir", "onnxscript", "numpy", "ml_dtypes")},
        "python": platform.python_version(),
        "source": {**source, "architecture": checkpoint.architecture, "files": dict(sorted(source_sha256.items()))},
        "task": task,
        **({} if encoder is None else {"encoder": dict(encoder)}),
        "precision": policy.precision,
        "execution_provider": policy.provider,
        "activations": policy.dtype,
        "cache": policy.cache,
        **({"states": "float32"} if _keeps_states(graphs) else {}),
        "policy": policy.described(),
        "quantization": asdict(policy.options),
        **({} if calibration is None else {"calibration": dict(calibration)}),
        **({} if imported is None else {"imported": dict(imported)}),
        "parts": {name: _part(graph, written) for name, graph in graphs.items()},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": known_sha256.get(path.name) or sha256_file(path)}
            for path in files
        },
    }
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def _keeps_states(graphs: Mapping[str, Graph]) -> bool:
    """Whether layers of linear attention keep states."""
    names = (str(value.name) for graph in graphs.values() for value in graph.model.graph.inputs)
    return any(name.endswith(".recurrent_state") for name in names)


def _part(graph: Graph, written: dict[tuple[str, int], str]) -> dict[str, Any]:
    ports = {
        kind: {
            value.name: [str(value.dtype), [d if isinstance(d, int) else str(d) for d in value.shape or ()]]
            for value in values
        }
        for kind, values in (("inputs", graph.model.graph.inputs), ("outputs", graph.model.graph.outputs))
    }
    return {"name": graph.name, **ports, "weights": {weight.path: _weight(weight, written) for weight in graph.weights}}


def _weight(weight: Weight, written: dict[tuple[str, int], str]) -> dict[str, Any]:
    """The entry of a weight. If its place is already in ``written`` (place → path), ``shared_with`` has that path."""
    arrays = weight.storage.arrays(weight.rows, weight.cols).values()
    size = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in arrays)
    shape = [weight.rows] if weight.cols == 1 else [weight.rows, weight.cols]
    entry = {"storage": weight.storage.label, "shape": shape, "bytes": size, **weight.transform.described()}
    place = _place(weight)
    if place in written:
        entry["shared_with"] = written[place]
    else:
        written[place] = weight.path
    return entry


def _place(weight: Weight) -> tuple[str, int]:
    tensor = next(iter(weight.parameters.values())).const_value
    assert isinstance(tensor, ir.ExternalTensor), "a package's weights are written before its manifest"
    return str(tensor.location), tensor.offset or 0
