"""What a package is made of, as data that the command line prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import quote
from vlpack.errors import PackageError
from vlpack.package.manifest import MANIFEST, damaged_files, graph_files, package_json, read_manifest, unlisted_files
from vlpack.package.validate import check_config
from vlpack.tasks import GENERATE

CONFIG = "genai_config.json"


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
            "inputs": without_cache(part["inputs"]),
            "outputs": without_cache(part["outputs"]),
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


def without_cache(ports: dict[str, Any]) -> dict[str, Any]:
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
