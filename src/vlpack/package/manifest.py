"""Reads and checks ``vlpack.json``, the manifest of a package. Its last entry is the hash of all others."""

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
"""Version of the manifest's format."""


def refresh(folder: Path, name: str) -> None:
    """Updates the manifest's size and hash of a file that vlpack has rewritten."""
    manifest = read_manifest(folder)
    path = folder / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON text, with the hash of its other entries as the last one."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a package.

    Raises:
        PackageError: there is no manifest, or it is damaged or of an unknown format.
    """
    path = folder / MANIFEST
    manifest = package_json(folder, MANIFEST)
    if manifest is None:
        hint = None
        if (folder / "config.json").is_file():
            hint = f"It looks like a checkpoint: build a package from it with `vlpack build {folder} -o PACKAGE`."
        raise PackageError(f"{folder} is not a vlpack package: it has no {MANIFEST}.", hint)
    if not isinstance(manifest.get("files"), dict):
        raise PackageError(f"{path} is not a manifest of vlpack: it has no list of files.")
    if manifest.get("format") != FORMAT:
        raise PackageError(
            f"{path} has format {quote(manifest.get('format'))}; this vlpack reads format {FORMAT}.",
            "Build the package again.",
        )
    return manifest


def package_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Reads the object in a JSON file of an untrusted package; None if there is no such file.

    Raises:
        PackageError: the file is not a JSON object, too large, not a regular file or a link out of the folder, or an
            object in it has a key twice, where another program might read the other value.
    """
    try:
        target = locate(folder, name)
        return None if target is None else read_json(folder / name, target, strict=True)
    except CheckpointError as error:
        raise PackageError(error.message, "Build or copy the package again.") from None


def check_folder(folder: Path) -> None:
    """Raises a PackageError, with a hint what to do, if the folder of a package does not exist."""
    hint = "Give the folder of a package that `vlpack build` made."
    if is_hub_id(folder):
        hint += (
            f" If {folder} is a checkpoint of the Hub, build it first and give the folder of its package: "
            f"`vlpack build {folder}` prints it, and in Python it is `vlpack.build({str(folder)!r}).folder`."
        )
    existing_folder(folder, PackageError, hint)


def whole_package(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a package and checks that all its files exist with the listed sizes.

    Raises:
        PackageError: the folder is not a package, or files are missing or have other sizes.
    """
    check_folder(folder)
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, hashes=False)
    if problems:
        raise PackageError(f"{folder} is damaged: {' '.join(problems[:3])}", "Build or copy the package again.")
    return manifest


def graph_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The file name of each part's graph, after a check that graphs and weights all lie in files of the package.

    Raises:
        PackageError: the manifest or a graph, which are untrusted, refers to other files.
    """
    try:
        files = {str(part["name"]): name for name, part in manifest["parts"].items()}
    except (KeyError, TypeError, AttributeError):
        raise PackageError(f"{folder}: the manifest does not list the parts.", "Build the package again.") from None
    if set(files.values()) - set(manifest["files"]):
        raise PackageError(
            f"{folder}: the manifest names graphs that are not among its files.", "Build the package again."
        )
    check_graphs(folder, files, manifest["files"])
    return files


def unlisted_files(folder: Path, manifest: Mapping[str, Any]) -> Sequence[str]:
    """Names of files, links and folders in a package's folder that its manifest does not list.

    vlpack reads none of them, but other programs that use the folder may.

    Raises:
        PackageError: the folder cannot be listed.
    """
    try:
        there = os.listdir(folder)
    except OSError as error:
        raise PackageError(f"{folder} cannot be listed: {error.strerror or error}.") from None
    return sorted(set(there) - {MANIFEST, *manifest["files"]})


def damaged_files(folder: Path, manifest: Mapping[str, Any], *, hashes: bool) -> Sequence[str]:
    """Checks the files that a manifest lists and returns a sentence for each that is missing or altered.

    Args:
        folder: the package's folder.
        manifest: the manifest that `read_manifest` returned.
        hashes: whether to compare the SHA-256 of every file, in addition to its size.
    """
    problems = []
    if hashes and (folder / MANIFEST).read_bytes() != sealed(manifest).encode():
        problems.append(f"{MANIFEST} was altered: its sha256 does not match its contents.")
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not name.isprintable() or not isinstance(entry, dict):
            problems.append(f"{MANIFEST} names the file {quote(name)}, which is not a plain name.")
            continue
        try:
            there = locate(folder, name) is not None and path.is_file()
        except CheckpointError as error:  # a link out of the folder, or a dangling one
            problems.append(error.message)
            continue
        if not there:
            problems.append(f"{name} is missing.")
        elif path.stat().st_size != entry.get("bytes"):
            problems.append(f"{name} has {path.stat().st_size} bytes, but {entry.get('bytes')} were written.")
        elif hashes and sha256_file(path) != entry.get("sha256"):
            problems.append(f"{name} was altered: its sha256 is not the one in {MANIFEST}.")
    return problems
