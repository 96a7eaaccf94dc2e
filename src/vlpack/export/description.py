"""Describes a checkpoint, and the package that vlpack would build from it, as data for ``vlpack inspect``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlpack.architectures import Architecture, Part, architecture_of, read_settings
from vlpack.architectures.hparams import TextFacts, VisionFacts
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.task import decide_task
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import Unpacked, detect
from vlpack.errors import Note
from vlpack.export.check import check_tensors
from vlpack.export.imported import OWN_BITS, outcomes
from vlpack.export.imported import described as summary
from vlpack.package.description import without_cache
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.tasks import AUTO, GENERATE, RERANKER


def inspect_checkpoint(
    folder: Path, *, weights: bool = True, mmproj: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Describes a checkpoint: architecture, sizes, tensors by dtype, and the parts of a package built from it.

    For a quantized checkpoint, ``quantized`` has its format and, if weights are read, what a build without a precision
    makes of each group of matrices.

    Args:
        folder: the checkpoint's folder.
        weights: whether to read the weights' headers; otherwise only config.json is used, and ``bytes`` is None.
        mmproj: GGUF file with the vision encoder of the model in the GGUF file ``folder``.

    Raises:
        CheckpointError: the checkpoint is not supported, or its weights do not fit its config.
    """
    with Checkpoint.open(folder, mmproj) if weights else Checkpoint.open_settings(folder) as checkpoint:
        described: dict[str, Any] = {
            "kind": "checkpoint",
            "folder": str(folder),
            "architecture": checkpoint.architecture,
            "bytes": checkpoint.total_bytes() if weights else None,
            "dtypes": _dtypes(checkpoint),
            "files": {path.name: path.stat().st_size for path in checkpoint.weight_files()},
        }
        if weights:
            task, notes = decide_task(checkpoint, AUTO, folder.resolve().name)
            architecture, named = architecture_of(checkpoint, task)
            policy = make_policy("fp32", "cpu", QuantizationOptions(), architecture.precision_facts)
            check_tensors(architecture, named, policy)
            if isinstance(named, Unpacked):
                described["quantized"] = _imported(architecture, named)
        else:
            architecture = read_settings(checkpoint)
            if (declared := detect(checkpoint)) is not None:
                described["quantized"] = {"format": declared.label, "bits": declared.bits}
            task, notes = decide_task(checkpoint, AUTO, folder.resolve().name)
            # a reranker needs the token ids of yes and no, which only the tokenizer knows
            architecture.task = GENERATE if task == RERANKER else task
            notes = [*notes, "The weights were not read, so this description follows from config.json alone."]
        parts = architecture.parts(GraphOptions())
        return {
            **described,
            "notes": [Note(note) for note in (*checkpoint.notes, *notes)],
            "task": task,
            "tied": architecture.tied,
            "text": _sizes(architecture.text),
            "vision": _sizes(architecture.vision) if architecture.vision else None,
            "deepstack_levels": architecture.deepstack.levels,
            "parts": [part.name for part in parts],
            "graphs": {part.name: _ports(part) for part in parts},
        }


def _imported(architecture: Architecture, checkpoint: Unpacked) -> dict[str, Any]:
    """What becomes of the matrices of a quantized checkpoint in a package for the CPU, with its own bits."""
    precision = "int4" if checkpoint.declared.bits == 4 else "int8"
    policy = make_policy(precision, "cpu", QuantizationOptions(), architecture.precision_facts)
    found = outcomes(architecture, policy, checkpoint, checkpoint, OWN_BITS)
    return {**summary(checkpoint.declared, found), "skipped": list(checkpoint.declared.skipped)}


def _sizes(facts: TextFacts | VisionFacts) -> dict[str, Any]:
    """Sizes as JSON: those of linear attention are beside the others, and absent if there is none."""
    sizes = asdict(facts)
    linear, layers = sizes.pop("delta_net", None), sizes.pop("linear_layers", ())
    if linear is None:
        return sizes
    return {**sizes, "linear_layers": len(layers), **{f"linear_{name}": value for name, value in linear.items()}}


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = dtypes.setdefault(str(tensor.dtype), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dtypes


def _ports(part: Part) -> dict[str, Any]:
    return {
        kind: without_cache({port.name: [str(port.dtype), list(port.shape)] for port in ports})
        for kind, ports in (("inputs", part.inputs), ("outputs", part.outputs))
    }
