"""What a package or a checkpoint is made of, as data that the command line prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlpack.architectures import Part, architecture_of, read_settings
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.task import decide_task
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import existing_folder, quote
from vlpack.checkpoint.hub import SETTINGS, is_folder, is_hub_id, resolve
from vlpack.errors import PackageError, VlpackError
from vlpack.export.check import check_tensors
from vlpack.package.manifest import MANIFEST, damaged_files, graph_files, package_json, read_manifest, unlisted_files
from vlpack.package.validate import check_config
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.tasks import AUTO, GENERATE, RERANKER

CONFIG = "genai_config.json"


def inspect(path: str | os.PathLike[str], *, hashes: bool = True) -> dict[str, Any]:
    """Describe a package (hashes checked) or a checkpoint.

    Args:
        path: of its folder; or the Hub id of a checkpoint, of which no weights are downloaded.
        hashes: of a package's files are compared.

    Returns:
        JSON-like: ``kind`` is ``package`` or ``checkpoint``; see `inspect_package` and `inspect_checkpoint`.

    Raises:
        VlpackError: it is neither, or cannot be read.
    """
    if is_hub_id(path) and not is_folder(path):
        return inspect_checkpoint(resolve(os.fspath(path), patterns=SETTINGS).folder, weights=False)
    folder = existing_folder(path, VlpackError, "Give the folder of a package or of a checkpoint, or a Hub id.")
    if (folder / MANIFEST).is_file():
        return inspect_package(folder, hashes=hashes)
    return inspect_checkpoint(folder, weights=_has_weights(folder))


def inspect_package(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """Architecture, source, policy, parts with their ports and storage by layer group, files and their condition.

    ``problems`` also names what was added to the folder: a chat template beside vlpack's files, say, would change
    prompts in programs that read it. ``unlisted`` has all such names, hidden ones (``.git``, ``.DS_Store``) too.
    """
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, hashes=hashes)
    try:
        described = _described(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise PackageError(f"{folder / MANIFEST} is damaged: entries are missing.", "Build it again.") from None
    unlisted = unlisted_files(folder, manifest)
    added = [name for name in unlisted if not name.startswith(".")]
    problems = list(problems)
    if not problems:  # the manifest may be forged to match
        try:
            graphs = graph_files(folder, manifest)
            check_config(folder / CONFIG, package_json(folder, CONFIG), manifest["files"], graphs)
        except PackageError as error:
            problems.append(error.message)
    problems += [f"{quote(name)} is not one of the package's files: it was added later." for name in added]
    return {
        "kind": "package",
        "folder": str(folder),
        **described,
        "hashes_checked": hashes,
        "unlisted": list(unlisted),
        "problems": problems,
    }


def _described(manifest: dict[str, Any]) -> dict[str, Any]:
    parts = {}
    for filename, part in manifest["parts"].items():
        parts[part["name"]] = {
            "file": filename,
            "inputs": _without_cache(part["inputs"]),
            "outputs": _without_cache(part["outputs"]),
            "groups": _groups(part["weights"]),
        }
    source = _without_files(manifest["source"])
    if "adapters" in source:
        source["adapters"] = [_without_files(adapter) for adapter in source["adapters"]]
    return {
        "architecture": source["architecture"],
        "task": manifest.get("task", GENERATE),
        "source": source,
        "vlpack": manifest["vlpack"],
        "precision": manifest["precision"],
        "execution_provider": manifest["execution_provider"],
        "activations": manifest["activations"],
        "cache": manifest.get("cache", manifest["activations"]),
        "policy": manifest["policy"],
        "parts": parts,
        "files": {name: int(entry["bytes"]) for name, entry in manifest["files"].items()},
    }


def _without_files(origin: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in origin.items() if name != "files"}


def _without_cache(ports: dict[str, Any]) -> dict[str, Any]:
    """The cache's many ports as one line each for keys and values."""
    shown: dict[str, Any] = {}
    for name, port in ports.items():
        head, _, rest = name.partition(".")
        in_cache = head in ("past_key_values", "present")
        shown.setdefault(f"{head}.*.{rest.partition('.')[2]}" if in_cache else name, port)
    return shown


def _groups(weights: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights of equal name and storage in all layers, as one row; bytes of those that are stored here."""
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for path, weight in weights.items():
        name = ".".join("*" if part.isdigit() else part for part in path.split("."))
        storage = weight["storage"]
        owner = weight.get("shared_with")
        new = {"modules": name, "storage": storage, "count": 0, "bytes": 0, "shared_with": []}
        row = rows.setdefault((name, storage, owner is None), new)
        row["count"] += 1
        if owner is None:
            row["bytes"] += weight["bytes"]
        else:
            row["shared_with"].append(str(owner))
    return list(rows.values())


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
            "notes": notes,
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
        kind: _without_cache({port.name: [str(port.dtype), list(port.shape)] for port in ports})
        for kind, ports in (("inputs", part.inputs), ("outputs", part.outputs))
    }


def _has_weights(folder: Path) -> bool:
    """Whether anything in a folder looks like weights, of whatever kind, or should: an index lists them."""
    try:
        names = os.listdir(folder)
    except OSError:
        return True  # which is told when it is opened
    return any(name.endswith((*_WEIGHTS, ".index.json")) or name == "adapter_config.json" for name in names)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
