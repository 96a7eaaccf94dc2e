"""Folders of inputs and outputs: on this machine, or at a URI that pyarrow knows, such as ``s3://bucket/folder``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import posixpath
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote

from vlpack.errors import InputError, OptionError


def pyarrow(what: str) -> Any:
    """Imports and returns the module pyarrow.

    Args:
        what: what needs pyarrow, for the error.

    Raises:
        OptionError: pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise OptionError(f"{what} needs pyarrow, which is not installed.", "pip install 'vlpack[batch]'")
    import pyarrow as module

    return module


def is_uri(given: str) -> bool:
    """Whether a text is a URI, such as ``s3://bucket/folder``, and not a path."""
    return "://" in given[:16]


def without_secrets(given: str) -> str:
    """A URI without the user name and password that it may have; other texts are returned unchanged."""
    return re.sub(r"(://)[^/?]*@", r"\1", given) if is_uri(given) else given


class Storage(Protocol):
    """The interface of a folder with files, whose names are paths relative to it with ``/`` between folders.

    Attributes:
        name: the folder as the user gave it, without passwords, for messages.
    """

    name: str

    def names(self) -> Iterator[str]:
        """The names of all files in the folder and the folders in it, sorted within each folder."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading; raises an OSError if that is not possible."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically; raises an OSError if that is not possible."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        ...


class Local:
    """A folder on this machine.

    Args:
        folder: path of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def names(self) -> Iterator[str]:
        """The names of all files in the folder and the folders in it; links to folders are not followed."""
        for place, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                yield Path(os.path.relpath(os.path.join(place, name), self.folder)).as_posix()

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading."""
        return (self.folder / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically."""
        replace_file(self.folder / name, data)

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        (self.folder / name).unlink(missing_ok=True)


class Remote:
    """A folder at a URI, which pyarrow's file systems read and write.

    In an object store, a file appears when it is complete. In other file systems it is written under another name and
    renamed.

    Args:
        uri: URI of the folder, such as ``s3://bucket/folder``.

    Attributes:
        uri: the URI.

    Raises:
        OptionError: pyarrow is not installed.
        InputError: pyarrow has no file system for the URI.
    """

    def __init__(self, uri: str) -> None:
        base, mark, query = uri.partition("?")
        self.uri = f"{base.rstrip('/')}{mark}{query}"
        self.name = without_secrets(self.uri)
        self._fs, self._root = _file_system(self.uri)

    def __reduce__(self) -> tuple[type[Remote], tuple[str]]:
        return Remote, (self.uri,)

    def split(self) -> tuple[Remote, str]:
        """The folder in which the file at this URI is, and the file's name."""
        base, mark, query = self.uri.partition("?")
        folder, _, name = base.rpartition("/")
        return Remote(f"{folder}{mark}{query}"), unquote(name)

    def has(self, other: Remote, name: str) -> bool:
        """Whether a file of another folder is directly in this one."""
        return posixpath.dirname(other._path(name)) == self._root and other._fs.equals(self._fs)

    def is_file(self) -> bool:
        """Whether the URI is that of a file."""
        return self._kind() == "File"

    def is_folder(self) -> bool:
        """Whether there is a folder at the URI."""
        return self._kind() == "Directory"

    def _kind(self) -> str:
        try:
            return str(self._fs.get_file_info(self._root).type.name)
        except OSError as error:
            raise InputError(f"{self.name} cannot be read: {_said(error)}.") from None

    def names(self) -> Iterator[str]:
        """The names of all files in the folder and the folders in it; none if there is no folder."""
        from pyarrow import fs

        selected = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = (one.path for one in self._fs.get_file_info(selected) if one.type == fs.FileType.File)
        yield from sorted((posixpath.relpath(path, self._root) for path in found), key=_order)

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading."""
        file: IO[bytes] = io.BufferedReader(self._fs.open_input_file(self._path(name)), 1 << 20)
        return file

    def size(self, name: str) -> int:
        """The size of a file in bytes; raises a FileNotFoundError if there is none."""
        from pyarrow import fs

        found = self._fs.get_file_info(self._path(name))
        if found.type != fs.FileType.File:
            raise FileNotFoundError(f"there is no file {name}")
        return int(found.size)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically."""
        path = self._path(name)
        whole = self._fs.type_name in ("s3", "gcs", "abfs")  # an object exists only once its upload is complete
        if not whole:
            self._fs.create_dir(posixpath.dirname(path), recursive=True)
        folder, last = posixpath.split(path)
        written = path if whole else f"{folder}/.{last}.new-{secrets.token_hex(4)}"
        with self._fs.open_output_stream(written) as file:
            file.write(data)
        if not whole:
            self._fs.move(written, path)

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def storage(given: str) -> Local | Remote:
    """The folder at a path or URI."""
    return Remote(given) if is_uri(given) else Local(Path(os.path.expanduser(given)))


def _file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    arrow = pyarrow(f"The URI {uri}")
    from pyarrow import fs

    try:
        found, path = fs.FileSystem.from_uri(uri)
    except (arrow.ArrowException, OSError, ValueError) as error:
        shown = without_secrets(uri)
        raise InputError(f"{shown} cannot be opened: {_said(error).replace(uri, shown)}.") from None
    return found, path.rstrip("/")


def _said(error: BaseException) -> str:
    """The message of an error of pyarrow, at most 200 characters."""
    return str(error).strip().rstrip(".")[:200]


def _order(name: str) -> tuple[list[str], str]:
    """The key by which names are sorted as `os.walk` lists them: the files of a folder come before its folders."""
    *folders, last = name.split("/")
    return folders, last


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file atomically: neither a reader nor a power failure can find it written in part."""
    partial = path.with_name(f".{path.name.lstrip('.')}.new-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all bytes to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder safe from a power failure, where the system can do so."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
