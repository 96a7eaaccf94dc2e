"""The folder in which the files of rows must be, which paths in rows cannot leave, neither by ``..`` nor by a link.

It is on this machine, or at a URI that pyarrow knows.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from vlpack.bulk.storage import Remote, is_uri
from vlpack.checkpoint.files import read_small
from vlpack.errors import CheckpointError, InputError, option

_SNAPSHOT = re.compile(r"/(datasets|models)--[^/]+/snapshots/[^/]+$")
"""Pattern of the path of a snapshot in the Hugging Face cache."""


class Folder:
    """A folder from which files are read by paths that come from untrusted rows.

    Args:
        folder: path of the folder; None if rows may name no files.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._home = None if folder is None else Path(os.path.realpath(folder))
        self._allowed = [] if self._home is None else [self._home]
        if self._home is not None and _SNAPSHOT.search(self._home.as_posix()):
            # links in the Hugging Face cache lead to the blobs of the same repository
            self._allowed.append(self._home.parent.parent / "blobs")

    def find(self, path: str) -> Path:
        """The real path of a file in the folder.

        Raises:
            InputError: there is no such file, or it is outside of the folder.
        """
        if self._home is None:
            raise InputError(f"The row names the file {path[:200]!r}, but rows of this input have no folder of files.")
        try:
            target = Path(os.path.realpath(self._home / path))
            inside = any(target.is_relative_to(home) for home in self._allowed)
            there, regular = target.exists(), target.is_file()
        except (OSError, ValueError) as error:  # a null byte, a name that is too long, a cycle of links
            raise InputError(f"{path[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        if not inside:  # checked first, so that a row cannot find out which files exist elsewhere
            raise InputError(
                f"{path[:200]!r} is outside of the folder {self._folder}.",
                f"Give a folder that contains all files of the rows with {option('files')}.",
            )
        if not there:
            raise InputError(f"There is no file {path[:200]!r} in {self._folder}.")
        if not regular:
            raise InputError(f"{path[:200]!r} is not a regular file.")
        return target

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a file in the folder.

        Raises:
            InputError: there is no such file, it is outside of the folder, or has more than ``most`` bytes.
        """
        target = self.find(path)
        try:
            return read_small(Path(path), target, most)
        except CheckpointError as error:
            raise InputError(error.message, error.hint) from None


class RemoteFolder:
    """A folder at a URI, from which files are read by paths that come from untrusted rows.

    Args:
        uri: URI of the folder.
    """

    def __init__(self, uri: str) -> None:
        self._storage = Remote(uri)

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a file in the folder.

        Raises:
            InputError: there is no such file, it is outside of the folder, or has more than ``most`` bytes.
        """
        name = posixpath.normpath(path)
        if posixpath.isabs(name) or name.split("/")[0] == ".." or "\0" in name:
            raise InputError(f"{path[:200]!r} is outside of the folder {self._storage.name}.")
        try:
            size = self._storage.size(name)
            if size > most:
                raise InputError(f"{path[:200]!r} has {size} bytes; at most {most} are read.")
            with self._storage.open(name) as file:
                return file.read(most)
        except FileNotFoundError:
            raise InputError(f"There is no file {path[:200]!r} in {self._storage.name}.") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path[:200]!r} cannot be read: {str(error)[:200]}.") from None


def folder_of(folder: str | None) -> Folder | RemoteFolder:
    """The folder at a path or URI; None if rows may name no files."""
    return RemoteFolder(folder) if folder is not None and is_uri(folder) else Folder(folder)
