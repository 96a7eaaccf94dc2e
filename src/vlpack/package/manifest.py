"""``vlpack.json``, the manifest of a package, read and checked; its last entry is the hash of the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import existing_folder, locate, quote, read_json, sha256_file
from vlpack.checkpoint.hub import is_hub_id
from vlpack.errors import CheckpointError, PackageError
from vlpack.package.validate import check_graphs

MANIFEST = "vlpack.json"
FORMAT = 1


def refresh(folder: Path, name: str) -> None:
    """Bring the manifest's entry of a file that vlpack has rewritten up to date."""
    manifest = read_manifest(folder)
    path = folder / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest's text, with its own hash at the end."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package.

    Raises:
        PackageError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    manifest = package_json(folder, MANIFEST)
    if manifest is None:
        hint = None
        if (folder / "config.json").is_file():
            hint = f"It looks like a checkpoint: make a package of it with `vlpack build {folder} -o PACKAGE`."
        raise PackageError(f"{folder} is not a vlpack package: it has no {MANIFEST}.", hint)
    if not isinstance(manifest.get("files"), dict):
        raise PackageError(f"{path} is not a manifest of vlpack.")
    if manifest.get("format") != FORMAT:
        raise PackageError(
            f"{path} has format {quote(manifest.get('format'))}; this vlpack reads format {FORMAT}.",
            "Build the package again.",
        )
    return manifest


def package_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a package, which anybody may have written; None where there is no such file.

    Raises:
        PackageError: it is no object, too large, no regular file, a link that leads out, or has a key twice, of which
            another reader might take the other.
    """
    try:
        target = locate(folder, name)
        return None if target is None else read_json(folder / name, target, strict=True)
    except CheckpointError as error:
        raise PackageError(error.message, "Build or copy the package again.") from None


def check_folder(folder: Path) -> None:
    """Raises a PackageError where there is no folder, with what to do about it."""
    hint = "Give the folder of a package that `vlpack build` made."
    if is_hub_id(folder):
        hint += f" If {folder} is a checkpoint of the Hub, build it first: `vlpack build {folder} -o PACKAGE`."
    existing_folder(folder, PackageError, hint)


def whole_package(folder: Path) -> dict[str, Any]:
    """The manifest of a package whose files are all there in their sizes.

    Raises:
        PackageError: it is none, or files are missing or of other sizes.
    """
    check_folder(folder)
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, hashes=False)
    if problems:
        raise PackageError(f"{folder} is damaged: {' '.join(problems[:3])}", "Build or copy the package again.")
    return manifest


def graph_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Part → file name of its graph, which is one of the package's files, as all files are that hold its weights.

    Raises:
        PackageError: the manifest or a graph, which anybody may have written, says something else.
    """
    try:
        files = {str(part["name"]): name for name, part in manifest["parts"].items()}
    except (KeyError, TypeError, AttributeError):
        raise PackageError(f"{folder}: the manifest does not say which parts there are.", "Build it again.") from None
    if set(files.values()) - set(manifest["files"]):
        raise PackageError(f"{folder}: the manifest names graphs that are not its files.", "Build it again.")
    check_graphs(folder, files, manifest["files"])
    return files


def unlisted_files(folder: Path, manifest: Mapping[str, Any]) -> Sequence[str]:
    """What lies in a package's folder, be it a file, link or folder, that its manifest does not list.

    vlpack reads none of it, but other programs that take the folder may.

    Raises:
        PackageError: the folder cannot be listed.
    """
    try:
        there = os.listdir(folder)
    except OSError as error:
        raise PackageError(f"{folder} cannot be listed: {error.strerror or error}.") from None
    return sorted(set(there) - {MANIFEST, *manifest["files"]})


def damaged_files(folder: Path, manifest: Mapping[str, Any], *, hashes: bool) -> Sequence[str]:
    """A sentence for every file of the manifest that is missing or altered.

    Args:
        folder: the package.
        manifest: as `read_manifest` gives it.
        hashes: compare contents too, not sizes alone.
    """
    problems = []
    if hashes and (folder / MANIFEST).read_bytes() != sealed(manifest).encode():
        problems.append(f"{MANIFEST} was altered: its own sha256 is another than when it was written.")
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not name.isprintable() or not isinstance(entry, dict):
            problems.append(f"{MANIFEST} names the file {quote(name)}, which is not a plain name.")
            continue
        try:
            there = locate(folder, name) is not None and path.is_file()
        except CheckpointError as error:  # a link out of the folder, or to nothing
            problems.append(error.message)
            continue
        if not there:
            problems.append(f"{name} is missing.")
        elif path.stat().st_size != entry.get("bytes"):
            problems.append(f"{name} has {path.stat().st_size} bytes where {entry.get('bytes')} were written.")
        elif hashes and sha256_file(path) != entry.get("sha256"):
            problems.append(f"{name} was altered: its sha256 is another than when it was written.")
    return problems
