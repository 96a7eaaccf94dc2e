"""The files of a package as they were when it was loaded, so that none of another package is opened later."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlpack.errors import PackageError
from vlpack.package.manifest import MANIFEST, whole_package

Stamp = tuple[int, int, int, int]
"""Device, inode, size in bytes and time of the last change in nanoseconds."""


class LoadedFiles:
    """A package's manifest, and which files it described when it was read.

    A package can be replaced while a program uses it (``vlpack build --force``). Parts that are opened later than the
    others, such as the vision encoder, would then come from another package without a word.

    Args:
        folder: the package.

    Attributes:
        manifest: of the package, whose files were all there in their sizes.

    Raises:
        PackageError: the folder is not a complete package, or was replaced while it was read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        before = _stamp(folder / MANIFEST)
        self.manifest: dict[str, Any] = whole_package(folder)
        self._stamps = {name: _stamp(folder / name) for name in self.manifest["files"]}
        self._stamps[MANIFEST] = before
        self.check([MANIFEST])  # a folder is replaced as a whole: with the same manifest these are its files

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises a PackageError where one of these files (of all of them by default) is not what it was any more."""
        for name in self._stamps if names is None else names:
            stamp = _stamp(self.folder / name)
            if stamp is None or stamp != self._stamps.get(name):
                found = "was replaced or altered" if stamp else "is gone"
                raise PackageError(
                    f"{self.folder / name} {found} since the package was loaded, so it may belong to another one.",
                    "Load the package again.",
                )


def _stamp(path: Path) -> Stamp | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
