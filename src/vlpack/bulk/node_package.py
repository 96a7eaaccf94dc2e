"""The package on a machine of a cluster: a folder that is there, or a copy, which is made once on every machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlpack.bulk.storage import Remote, is_uri, without_secrets
from vlpack.errors import PackageError
from vlpack.package.manifest import MANIFEST, damaged_files, read_manifest, whole_package
from vlpack.store.place import packages_folder

KEPT_SECONDS = 24 * 3600
"""Time in seconds after which an earlier copy of a package that has changed is removed."""

CHUNK = 16 * 2**20
"""Number of bytes of a package that are sent at a time."""

Chunks = Callable[[str], Iterator[bytes]]
"""A function that returns the contents of a file of a package in pieces; raises an OSError if there is no such file."""


def node_package(package: str | os.PathLike[str]) -> Path:
    """The folder of a package on this machine; a package at a URI is copied once, whatever the number of processes.

    A copy is made again if the package at the URI has changed.

    Args:
        package: folder, or URI for pyarrow.

    Raises:
        PackageError: the package cannot be copied, or the copy is not complete.
    """
    given = os.fspath(package)
    if not is_uri(given):
        return Path(given).expanduser()
    source = Remote(given)

    def chunks(name: str) -> Iterator[bytes]:
        with source.open(name) as file:
            while data := file.read(CHUNK):
                yield data

    return copied(given, chunks)


def manifest_at(package: str) -> dict[str, Any]:
    """The manifest of a package in a folder or at a URI; a folder is checked for missing files.

    Raises:
        PackageError: there is no package, or it is damaged.
    """
    if not is_uri(package):
        return whole_package(Path(package).expanduser())
    try:
        with Remote(package).open(MANIFEST) as file:
            data = file.read()
    except OSError as error:
        raise PackageError(f"The package {without_secrets(package)} cannot be read: {str(error)[:200]}.") from None
    with tempfile.TemporaryDirectory(prefix="vlpack-") as place:
        (Path(place) / MANIFEST).write_bytes(data)
        try:
            return read_manifest(Path(place))
        except PackageError as error:
            shown = error.message.replace(place, without_secrets(package))
            raise PackageError(shown, error.hint) from None


def copied(name: str, chunks: Chunks) -> Path:
    """The folder on this machine with a copy of a package, in the version that its source has now.

    Args:
        name: name of the source, by which earlier copies are found.
        chunks: function that reads the files of the package.

    Raises:
        PackageError: the package cannot be copied, or the copy is not complete.
    """
    shown = without_secrets(name)
    try:
        manifest = b"".join(chunks(MANIFEST))
    except OSError as error:
        raise PackageError(f"The package {shown} cannot be copied: {str(error)[:200]}.") from None
    key = hashlib.sha256(name.encode()).hexdigest()[:24]
    place = packages_folder().parent / "copied" / f"{key}-{hashlib.sha256(manifest).hexdigest()[:12]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f"{key}.lock"):
        if not place.exists():
            _copy(shown, manifest, chunks, place)
        os.utime(place)
        for other in place.parent.glob(f"{key}-*"):  # one that was used just now may be about to be loaded
            if other != place and time.time() - other.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return place


def _copy(source: str, manifest: bytes, chunks: Chunks, place: Path) -> None:
    """Copies a package; all its files are checked against the hashes in the manifest before the copy appears."""
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    (partial / MANIFEST).write_bytes(manifest)
    try:
        for name in read_manifest(partial)["files"]:
            if Path(name).name != name:
                raise PackageError(f"The package {source} lists the file {name[:100]!r}, which is not a plain name.")
            with (partial / name).open("wb") as file:
                file.writelines(chunks(name))
    except (OSError, ValueError) as error:
        raise PackageError(f"The package {source} cannot be copied: {str(error)[:200]}.") from None
    problems = damaged_files(partial, read_manifest(partial), hashes=True)
    if problems:
        raise PackageError(f"The copy of the package {source} is damaged: {' '.join(problems[:3])}")
    partial.rename(place)


class PackageFiles:
    """The files of a package on this machine, which other machines read.

    Args:
        folder: folder of the package.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._names = {MANIFEST, *whole_package(self._folder)["files"]}

    def read(self, name: str, start: int) -> bytes:
        """At most `CHUNK` bytes of a file from a place on; none at its end."""
        if name not in self._names:
            raise FileNotFoundError(f"the package has no file {name[:100]!r}")
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(CHUNK)
