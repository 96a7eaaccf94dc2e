"""What a checkpoint is made of and what vlpack would make of it, as data that the command line prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.architectures import Part, architecture_of, read_settings
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.task import decide_task
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import Note
from vlpack.export.check import check_tensors
from vlpack.package.description import without_cache
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.tasks import AUTO, GENERATE, RERANKER


def inspect_checkpoint(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Architecture, sizes, tensors by dtype, and the parts that vlpack would make of it.

    Args:
        folder: the checkpoint.
        weights: look at them, too; else it is described by its config, and ``bytes`` is None.

    Raises:
        CheckpointError: weights and config do not fit, as a build would find.
    """
    with Checkpoint.open(folder) if weights else Checkpoint.open_settings(folder) as checkpoint:
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
        else:
            architecture = read_settings(checkpoint)
            task, notes = decide_task(checkpoint, AUTO, folder.resolve().name)
            architecture.task = GENERATE if task == RERANKER else task  # whose tokens only the tokenizer knows
            notes = [*notes, "Its weights were not looked at, so this is what its config.json says."]
        parts = architecture.parts(GraphOptions())
        return {
            **described,
            "notes": [Note(note) for note in notes],
            "task": task,
            "tied": architecture.tied,
            "text": vars(architecture.text),
            "vision": vars(architecture.vision) if architecture.vision else None,
            "deepstack_levels": architecture.deepstack.levels,
            "parts": [part.name for part in parts],
            "graphs": {part.name: _ports(part) for part in parts},
        }


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
