"""Opens untrusted files of a checkpoint: checks names, links, kinds of file, sizes, JSON and byte ranges."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from vlpack.errors import CheckpointError, VlpackError

MAX_JSON_BYTES = 10_000_000
"""Largest config file in JSON that is read, in bytes; the biggest real ones have a few hundred kB."""
MAX_JSON_DEPTH = 100
"""Deepest nesting of a JSON file that is read, far below Python's recursion limit, which later code could reach."""
MAX_OPEN_FILES = 64
"""Files kept open at once: checkpoints have up to a few hundred shards, and some systems allow only 256 open files."""
CHUNK_BYTES = 1 << 28
"""Bytes requested in one system call: Linux returns at most 2 GiB per call, and macOS refuses to read more."""

_POSITIONAL = hasattr(os, "preadv")  # Linux, macOS 11+, BSD; not Windows

DOWNLOAD_AGAIN = "The file is incomplete or damaged: download it again."


def quote(name: object) -> str:
    """An untrusted value as it appears in a message: escaped, and shortened to about a hundred characters."""
    text = ascii(name[:200] if isinstance(name, str) else name)
    return text if len(text) <= 120 else f"{text[:100]}…{text[-1]}"


def existing_folder(
    folder: str | os.PathLike[str], error: type[VlpackError] = CheckpointError, hint: str | None = None
) -> Path:
    """The path of an existing folder, with ``~`` expanded. Raises ``error``, which says what is there instead."""
    if folder == "":  # Path("") is the current folder, which an empty variable never means
        raise error("The folder's name is empty.", hint)
    try:
        path = Path(folder).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as reason:  # permission, name too long, a null byte, no such ~user
        raise error(f"{quote(str(folder))} cannot be opened: {_reason(reason)}.") from reason
    if exists and path.suffix == ".gguf":
        raise error(f"{path} is a GGUF file, not a folder.", f"Build a package from it: vlpack build {path} -o FOLDER.")
    if exists:
        raise error(f"{path} is a file, not a folder.", f"Give the folder it is in: {path.absolute().parent}.")
    raise error(f"There is no folder {quote(str(path))}.", hint)


def _reason(error: Exception) -> str:
    """The reason in an error, without the file name, which the message already contains."""
    return getattr(error, "strerror", None) or quote_error(error)


def check_plain_name(name: str, where: str) -> str:
    """Returns ``name`` if it is a plain file name; a path, which could lead to any file of this machine, is refused."""
    if (
        not name
        or len(name) > 255
        or name in {".", ".."}
        or any(c in name for c in '/\\:*?"<>|')
        or not name.isprintable()
    ):
        raise CheckpointError(
            f"{where}: {quote(name)} is not a plain file name.",
            "Files must lie directly in the checkpoint's folder; do not use a checkpoint that refers to others.",
        )
    return name


def locate(folder: Path, name: str) -> Path | None:
    """The real path of the file `name` of `folder`, links followed; None when there is no such file.

    A link may lead to another file of the folder, or, from a snapshot of the Hugging Face cache
    (`models--org--name/snapshots/<commit>/`), to that repository's own `blobs/`. All other links are refused: an
    archive from the internet could link to any private file of the user, whose bytes would then be in the package.
    """
    path = folder / name
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {quote_error(error)}.") from error
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is a link to a file that does not exist.", DOWNLOAD_AGAIN) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links, before Python 3.13
        raise CheckpointError(f"{path} cannot be opened: {quote_error(error)}.") from error
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link that leads out of the folder, to {target}.",
            "If that is what you want, copy the file into the folder in place of the link.",
        )
    return target


class OpenFile:
    """A file that is open for reading at any offset from any thread. Its path must be one that `locate` returned.

    Files are read with system calls and not mapped: pages of a mapping count as memory of this process, and if somebody
    truncates a mapped file, SIGBUS kills the process, whereas a short read can be reported as an error.
    """

    def __init__(self, shown: Path, target: Path) -> None:
        self.shown = shown  # the name for messages; the target may be a blob named by its hash
        self.users = 0
        self._lock = threading.Lock()
        self._fd = -1
        # The checked file may be swapped: O_NOFOLLOW refuses a link, O_NONBLOCK keeps open() from hanging on a FIFO.
        flags = os.O_RDONLY | sum(
            getattr(os, flag, 0) for flag in ("O_BINARY", "O_CLOEXEC", "O_NOINHERIT", "O_NOFOLLOW", "O_NONBLOCK")
        )
        try:
            self._fd = os.open(target, flags)
        except OSError as error:
            raise CheckpointError(f"{shown} cannot be opened: {error.strerror or error}.") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):  # a folder, a pipe, a device
            self.close()
            raise CheckpointError(f"{shown} is not a regular file.")
        self.size = status.st_size
        self.stamp = (status.st_size, status.st_mtime_ns)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills `out` with the file's bytes, starting at `offset`."""
        self.check_unchanged()
        done = 0
        while done < len(out):
            try:
                count = self._read_some(out[done : done + CHUNK_BYTES], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.shown} cannot be read: {error.strerror or error}.") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.shown} ends at byte {offset + done}, but bytes up to {offset + len(out)} are needed.",
                    DOWNLOAD_AGAIN,
                )
            done += count

    def sha256(self) -> str:
        """The SHA-256 of the whole file in hexadecimal, computed in pieces of 4 MiB."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
        for offset in range(0, self.size, len(buffer)):
            piece = buffer[: self.size - offset]
            self.read_into(piece, offset)
            digest.update(piece)
        return digest.hexdigest()

    def read(self, offset: int, count: int) -> bytes:
        """Returns `count` bytes of the file, starting at `offset`."""
        out = bytearray(count)
        self.read_into(memoryview(out), offset)
        return bytes(out)

    def check_unchanged(self) -> None:
        """Raises a CheckpointError if the file was written to since it was opened: its tensors may have moved."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self.stamp:
            raise CheckpointError(
                f"{self.shown} changed while it was in use: it had {self.stamp[0]} bytes and has {status.st_size} now.",
                "Start again when no other program writes to the checkpoint.",
            )

    def close(self) -> None:
        """Closes the file descriptor; closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _read_some(self, out: memoryview, offset: int) -> int:
        if sys.platform != "win32" and _POSITIONAL:
            return os.preadv(self._fd, [out], offset)
        with self._lock:  # the position is shared by all threads
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, min(len(out), 1 << 24))
        out[: len(data)] = data
        return len(data)


class FilePool:
    """The open files of a checkpoint. When there are more than `limit`, the least recently used one is closed."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._targets: dict[Path, Path] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._closed = False

    def add(self, shown: Path, target: Path) -> None:
        """Registers a located file; it is opened on first use."""
        self._targets[shown] = target

    @contextmanager
    def use(self, path: Path) -> Iterator[OpenFile]:
        """Yields an open file, which stays open at least until the `with` block ends."""
        with self._lock:
            if self._closed:
                raise ValueError("the checkpoint is closed")
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = OpenFile(path, self._targets[path])
                # A file that was closed to make room and is opened again must still be the one that was validated.
                file.stamp = self._stamps.setdefault(path, file.stamp)
            self._open.move_to_end(path)
            file.users += 1
            self._close_idle(self._limit)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                self._close_idle(0 if self._closed else self._limit)

    def close(self) -> None:
        """Closes all files; a file that another thread is using is closed when that thread has finished."""
        with self._lock:
            self._closed = True
            self._close_idle(0)

    def _close_idle(self, keep: int) -> None:
        if len(self._open) > keep:
            idle = [path for path, file in self._open.items() if file.users == 0]
            for path in idle[: len(self._open) - keep]:
                self._open.pop(path).close()


def read_json(shown: Path, target: Path, *, limit: int = MAX_JSON_BYTES, strict: bool = False) -> dict[str, Any]:
    """Reads the object in a JSON file of at most `limit` bytes, parsed by `parse_json`."""
    return parse_json(read_small(shown, target, limit), str(shown), strict=strict)


def read_json_list(shown: Path, target: Path) -> list[Any]:
    """Reads the list in a JSON file of at most `MAX_JSON_BYTES`."""
    value = _parse(read_small(shown, target, MAX_JSON_BYTES), str(shown), strict=False)
    if not isinstance(value, list):
        raise CheckpointError(f"{shown} must hold a JSON list, not a {type(value).__name__}.", DOWNLOAD_AGAIN)
    _check_depth(value, str(shown))
    return value


def read_small(shown: Path, target: Path, limit: int) -> bytes:
    """Reads a whole file. Raises a CheckpointError if it has more than ``limit`` bytes or cannot be read."""
    file = OpenFile(shown, target)
    try:
        if file.size > limit:
            raise CheckpointError(f"{shown} has {file.size} bytes; more than {limit} are not read.")
        data = file.read(0, file.size)
    finally:
        file.close()
    check_not_lfs_pointer(shown, data)
    return data


def check_not_lfs_pointer(shown: Path, start: bytes) -> None:
    """Raises a CheckpointError for the pointer that a clone without git-lfs leaves, the most common damage of all."""
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise CheckpointError(
            f"{shown} is a git-lfs pointer, not the file itself.", "Run `git lfs pull` in the checkpoint's folder."
        )


def parse_json(data: bytes, where: str, *, strict: bool = False) -> dict[str, Any]:
    """Parses a JSON object; `strict` also refuses repeated keys and NaN, which transformers accepts in configs."""
    value = _parse(data, where, strict)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, not a {type(value).__name__}.", DOWNLOAD_AGAIN)
    _check_depth(value, where)
    return value


def _parse(data: bytes, where: str, strict: bool) -> Any:
    try:
        if strict:
            return json.loads(data.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, or a number with thousands of digits
        raise CheckpointError(f"{where} is not valid JSON: {quote_error(error)}.", DOWNLOAD_AGAIN) from error


def quote_error(error: Exception) -> str:
    """The text of a library's error, escaped and shortened, to be used inside a sentence."""
    return ascii(str(error))[1:-1][:200].rstrip(".")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quote(repeated)} appears twice in one object")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(value: Any, where: str) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise CheckpointError(f"{where}: the JSON is nested more than {MAX_JSON_DEPTH} deep.")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hexadecimal."""
    file = OpenFile(Path(path), Path(path).resolve())
    try:
        return file.sha256()
    finally:
        file.close()
