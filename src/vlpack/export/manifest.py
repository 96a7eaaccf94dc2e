"""Writes ``vlpack.json``: where a package comes from, how each weight is stored, and the hash of every file.

It holds no time and no path, so that the same source, options and versions give the same bytes.
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
) -> None:
    """Write the manifest, last of all files, hashing those whose hash is not known yet.

    Args:
        folder: the package.
        checkpoint: what it was made from.
        source: ``repo_id`` and ``commit``, or the folder's ``name``.
        source_sha256: file name → hash of the checkpoint's files.
        policy: the precision policy.
        graphs: file name → graph.
        known_sha256: hashes computed while the files were written.
        task: one of `vlpack.tasks.TASKS`.
        encoder: `encoder_section`'s, for a model that does not generate.
        calibration: on what the weights were calibrated, if they were.
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
        "policy": policy.described(),
        "quantization": asdict(policy.options),
        **({} if calibration is None else {"calibration": dict(calibration)}),
        "parts": {name: _part(graph, written) for name, graph in graphs.items()},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": known_sha256.get(path.name) or sha256_file(path)}
            for path in files
        },
    }
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


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
    """Of one that is ``written`` already, place → path, ``shared_with`` tells where."""
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
