"""Describes a package as plain data, which ``vlpack inspect`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import quote
from vlpack.errors import PackageError
from vlpack.ort.kernels import kernel_counts, library
from vlpack.package.manifest import MANIFEST, damaged_files, graph_files, package_json, read_manifest, unlisted_files
from vlpack.package.validate import check_config
from vlpack.tasks import GENERATE

CONFIG = "genai_config.json"


def inspect_package(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """Describes a package: architecture, source, policy, parts with inputs and outputs, storage, files and problems.

    Args:
        folder: the package's folder.
        hashes: whether to compare the SHA-256 of every file, in addition to its size.

    Returns:
        JSON-like data. ``problems`` has a sentence for each damaged file and each file that was added later; an added
        chat template, for example, would change the prompts of programs that read it. ``unlisted`` names all added
        files, also hidden ones (``.git``, ``.DS_Store``), which are no problem. ``kernels`` names the instruction set
        of vlpack-kernels and counts its operators in each part, or has a ``problem`` if the installed version cannot be
        used; None if it is not installed or is turned off.

    Raises:
        PackageError: the folder is not a package, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, hashes=hashes)
    try:
        described = _described(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise PackageError(
            f"{folder / MANIFEST} is damaged: entries are missing.", "Build the package again."
        ) from None
    unlisted = unlisted_files(folder, manifest)
    added = [name for name in unlisted if not name.startswith(".")]
    problems = list(problems)
    if not problems:  # the manifest may be forged to match the files
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
        "kernels": None if problems else _kernels(folder, manifest),
        "hashes_checked": hashes,
        "unlisted": list(unlisted),
        "problems": problems,
    }


def _described(manifest: dict[str, Any]) -> dict[str, Any]:
    parts = {}
    for filename, part in manifest["parts"].items():
        parts[part["name"]] = {
            "file": filename,
            "inputs": without_cache(part["inputs"]),
            "outputs": without_cache(part["outputs"]),
            "groups": _groups(part["weights"]),
        }
    source = _without(manifest["source"], "files")
    if "adapters" in source:
        source["adapters"] = [_without(adapter, "files") for adapter in source["adapters"]]
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
        **({"imported": _without(manifest["imported"], "scales")} if "imported" in manifest else {}),
        "parts": parts,
        "files": {name: int(entry["bytes"]) for name, entry in manifest["files"].items()},
    }


def _without(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != name}


def _kernels(folder: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The operators of vlpack-kernels that vlpack's own sessions use for a package on this machine."""
    if manifest["execution_provider"] != "cpu":
        return None
    try:
        available = library()
    except PackageError as error:
        return {"instruction_set": None, "operators": {}, "problem": f"{error.message} {error.hint}"}
    if available is None:
        return None
    try:
        counts = {name: kernel_counts(folder / file) for name, file in graph_files(folder, manifest).items()}
    except PackageError:
        return None  # a damaged graph, if hashes are not compared
    return {
        "instruction_set": available.instruction_set,
        "operators": {n: found for n, found in counts.items() if found},
        "problem": None,
    }


def without_cache(ports: dict[str, Any]) -> dict[str, Any]:
    """Inputs or outputs, with the key/value cache of all layers merged into one entry for keys and one for values."""
    shown: dict[str, Any] = {}
    for name, port in ports.items():
        head, _, rest = name.partition(".")
        in_cache = head in ("past_key_values", "present")
        shown.setdefault(f"{head}.*.{rest.partition('.')[2]}" if in_cache else name, port)
    return shown


def _groups(weights: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups weights of all layers by name and storage. Weights that another graph stores count no bytes here."""
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
