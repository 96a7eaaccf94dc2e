"""Detects that a package's files were replaced after it was loaded, before files of another package are opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlpack.errors import PackageError
from vlpack.package.manifest import MANIFEST, whole_package

Stamp = tuple[int, int, int, int]
"""Identity of a file: device, inode, size in bytes, time of the last change in nanoseconds."""


class LoadedFiles:
    """A package's manifest together with the identity of its files at the time of loading.

    A package can be replaced while a program uses it (``vlpack build --force``). Parts that are opened later than the
    others, such as the vision encoder, would then silently come from another package.

    Args:
        folder: the package's folder.

    Attributes:
        manifest: the package's manifest; all files that it lists existed with the listed sizes.

    Raises:
        PackageError: the folder is not a complete package, or it was replaced while it was read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        before = _stamp(folder / MANIFEST)
        self.manifest: dict[str, Any] = whole_package(folder)
        self._stamps = {name: _stamp(folder / name) for name in self.manifest["files"]}
        self._stamps[MANIFEST] = before
        self.check([MANIFEST])  # folders are replaced as a whole, so with an unchanged manifest all files belong to it

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises a PackageError if one of ``names`` (by default, of all files) changed since the package was loaded."""
        for name in self._stamps if names is None else names:
            stamp = _stamp(self.folder / name)
            if stamp is None or stamp != self._stamps.get(name):
                found = "was replaced or altered" if stamp else "is gone"
                raise PackageError(
                    f"{self.folder / name} {found} since the package was loaded, so it may belong to another package.",
                    "Load the package again.",
                )


def _stamp(path: Path) -> Stamp | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
