"""The output of a batch: a folder of shards, which are written atomically, and a manifest that records the question.

Every finished row is first appended to a journal. When enough consecutive rows of the input are finished, they are
written to a temporary file, which is renamed to become the next shard. Then the journal is replaced by one with the
remaining rows. If a run is killed between these two steps, some rows are in both; the next run keeps those in the shard
and drops them from the journal. So a killed run loses only the rows that were being answered, and no row is written
twice.

A folder has these files:

- ``manifest.json``: the package and the question, which are the same for all rows, and the runs that wrote rows;
- ``part-00000.jsonl`` (or ``.parquet``) and so on: the rows, in the order of the input;
- ``.journal``: finished rows that are in no shard yet; it exists only until a run is complete;
- ``.lock``: a file that is locked by the run that writes into the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from vlpack.bulk.row import short_hash
from vlpack.bulk.shards import Format, Row, journal_line, journal_row
from vlpack.errors import OptionError, VlpackError, option

FORMAT = 1
"""Version of the manifest's format."""

MANIFEST, JOURNAL, LOCK = "manifest.json", ".journal", ".lock"
"""Names of the files of an output beside its shards."""
_PART = re.compile(r"part-(\d{5,})\.(jsonl|parquet)")
_TEMPORARY = re.compile(r"\.(part-\d+\.(jsonl|parquet)|manifest\.json|journal)\.new-[0-9a-f]{8}")
"""Pattern of the names of temporary files, which a run that was killed may leave."""

SHARD_BYTES = 64 * 2**20
"""Size of the rows waiting for a shard, in bytes, at which one is written even if it has fewer rows than usual. This
bounds the memory."""

SYNC_SECONDS = 1.0
"""Longest time in seconds until a row in the journal is also safe from a power failure."""


class Layout(NamedTuple):
    """The columns of an output's rows that have a meaning for the output itself.

    Attributes:
        name: name of the layout in the manifest.
        key: column with the row's id.
        status: column that shows whether the row failed.
        failed: function that returns, for the value of that column, whether the row failed.
    """

    name: str
    key: str
    status: str
    failed: Callable[[Any], bool]


ROWS = Layout("rows", "id", "error", lambda error: error is not None)
"""Layout of rows with the columns of the input and of the answer."""


class Output:
    """The output of a batch, which one run at a time writes into. Use it as a context manager.

    Args:
        folder: folder of the output; it is created, or continues an earlier run.
        layout: meaning of the columns of the rows.
        shards: file format of the shards.
        identity: what all rows have in common: ``package`` and ``question``, as JSON-like data.
        run: what the manifest records about this run, as JSON-like data.
        shard_rows: number of rows of a shard.
        retry_errors: whether rows that failed in earlier runs are removed, so that they are answered again.

    Attributes:
        rows: number of rows in the output.
        errors: number of them that failed.

    Raises:
        OptionError: the folder is something else, belongs to another package or question, or is in use.
        VlpackError: a file of the output is damaged, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        shards: Format,
        identity: Mapping[str, Any],
        run: Mapping[str, Any],
        *,
        shard_rows: int = 1000,
        retry_errors: bool = False,
    ) -> None:
        self.folder, self._layout, self._shards, self._shard_rows = folder, layout, shards, shard_rows
        self._identity = {"layout": layout.name, "shards": shards.suffix[1:], **identity}
        self._run, self._retry_errors = dict(run), retry_errors
        self.rows = self.errors = 0
        self._done: set[bytes] = set()
        self._kept: dict[str, Row] = {}
        self._waiting: dict[int, tuple[Row, int]] = {}
        self._ready: list[tuple[Row, int]] = []
        self._next = self._part = self._bytes = self._journal = 0
        self._synced = time.monotonic()
        self._lock: FileLock | None = None
        self._open = False

    def __enter__(self) -> Output:
        try:
            with self._told():
                self._prepare()
        except BaseException:  # a notebook keeps the error, and with it this object
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            with contextlib.suppress(OSError):
                os.fsync(self._journal)
            os.close(self._journal)
            self._open = False
        if self._lock is not None:
            self._lock.release()

    def done(self, key: str) -> bool:
        """Whether the row with this id is in a shard."""
        return short_hash(key) in self._done

    def keep(self, place: int, key: str) -> bool:
        """Takes over a row from the journal, which an earlier run finished but did not write to a shard.

        Args:
            place: place of the row among those that are in no shard, from 0.
            key: id of the row.

        Returns:
            Whether there was such a row; otherwise the row must be answered and given to `add`.
        """
        row = self._kept.pop(key, None)
        if row is None:
            return False
        self._waiting[place] = row, len(journal_line(row))
        self._cut()
        return True

    def add(self, place: int, row: Row) -> None:
        """Records a finished row.

        Args:
            place: place of the row among those that are in no shard, from 0; shards have the rows in this order.
            row: the row.

        Raises:
            VlpackError: a file cannot be written.
        """
        line = journal_line(row)
        self._count(row)
        with self._told():
            _write(self._journal, line)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._journal)
                self._synced = time.monotonic()
        self._waiting[place] = row, len(line)
        self._cut()

    def finish(self) -> None:
        """Writes all finished rows into shards and removes the journal."""
        with self._told():
            self._ready += [self._waiting.pop(place) for place in sorted(self._waiting)]
            self._ready += [(row, 0) for row in self._kept.values()]  # rows that the input no longer has
            self._kept.clear()
            while self._ready:
                self._write_shard(self._size())
            os.close(self._journal)
            self._open = False
            (self.folder / JOURNAL).unlink(missing_ok=True)
            _sync_folder(self.folder)

    def _cut(self) -> None:
        """Writes shards while there are enough finished rows in the order of the input."""
        while self._next in self._waiting:
            row = self._waiting.pop(self._next)
            self._ready.append(row)
            self._bytes += row[1]
            self._next += 1
        while len(self._ready) >= self._shard_rows or self._bytes >= SHARD_BYTES:
            with self._told():
                self._write_shard(self._size())
                self._new_journal()

    def _size(self) -> int:
        """The number of rows of the next shard."""
        size = 0
        for place, (_, length) in enumerate(self._ready[: self._shard_rows], 1):
            size += length
            if size >= SHARD_BYTES:
                return place
        return min(len(self._ready), self._shard_rows)

    def _write_shard(self, count: int) -> None:
        """Writes the first ``count`` of the finished rows into a new shard."""
        rows, self._ready = [row for row, _ in self._ready[:count]], self._ready[count:]
        self._bytes = sum(size for _, size in self._ready)
        _replace(self.folder / f"part-{self._part:05}{self._shards.suffix}", self._shards.encode(rows))
        self._part += 1
        self._done.update(short_hash(str(row[self._layout.key])) for row in rows)

    def _new_journal(self) -> None:
        """Replaces the journal by one with the rows that are in no shard."""
        rows = [*self._ready, *self._waiting.values()]
        lines = [journal_line(row) for row in (*(row for row, _ in rows), *self._kept.values())]
        if self._open:  # before it is replaced, because Windows replaces no open file
            os.close(self._journal)
            self._open = False
        _replace(self.folder / JOURNAL, b"".join(lines))
        self._journal = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        self._open = True

    def _count(self, row: Row) -> None:
        """Counts a finished row, and whether it failed."""
        self.rows += 1
        self.errors += self._layout.failed(row.get(self._layout.status))

    def _prepare(self) -> None:
        """Locks the folder, reads the rows that earlier runs have finished, and removes their temporary files."""
        self._check_place()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._lock = None
            raise OptionError(f"Another run of vlpack batch writes into {self.folder}.", "Wait for its end.") from None
        there = self._manifest()
        if _parts(self.folder) or self._journal_rows():  # otherwise no row has an answer to another question
            self._check_identity(there)
        for path in self.folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        for number, path in _parts(self.folder):
            self._part = number + 1
            if self._retry_errors:
                self._drop_errors(path)
            if path.exists():
                self._read_shard(path)
        self._read_journal()
        runs = [*there.get("runs", []), self._run]
        manifest = {"format": FORMAT, "kind": "vlpack batch", **self._identity, "runs": runs}
        _replace(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
        self._new_journal()

    def _check_place(self) -> None:
        """Raises an OptionError if the folder is neither new nor empty nor an output of a batch."""
        if self.folder.suffix in (".jsonl", ".parquet", ".json") and not self.folder.is_dir():
            raise OptionError(
                f"{option('output')} is {self.folder}, but the output is a folder of files.",
                f"Give a folder: {option('output', self.folder.with_suffix('').as_posix())}.",
            )
        if not self.folder.exists() or (self.folder / MANIFEST).is_file():
            return
        if not self.folder.is_dir():
            raise OptionError(f"{self.folder} exists and is not a folder.", f"Choose another {option('output')}.")
        others = [p.name for p in self.folder.iterdir() if p.name != LOCK and not _TEMPORARY.fullmatch(p.name)]
        if others:
            raise OptionError(
                f"{self.folder} exists and is not an output of vlpack batch: it contains {sorted(others)[0]!r}.",
                f"Choose another {option('output')}.",
            )

    def _manifest(self) -> dict[str, Any]:
        """The manifest that an earlier run has written; empty if there is none."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("kind") != "vlpack batch" or found.get("format") != FORMAT:
            raise OptionError(
                f"{path} is not a manifest that this version of vlpack batch reads.",
                f"Choose another {option('output')}.",
            )
        return found

    def _check_identity(self, there: Mapping[str, Any]) -> None:
        """Raises an OptionError if the output has rows of another package, question or format."""
        if not there:
            return
        now, another = self._identity, f"Choose another {option('output')}, or the same options as before."
        old = there.get("package") or {}
        if old.get("sha256") != now["package"]["sha256"]:
            raise OptionError(
                f"{self.folder} has answers of another package: {old.get('name')} ({str(old.get('sha256'))[:12]}), "
                f"not {now['package']['name']} ({now['package']['sha256'][:12]}).",
                f"Choose another {option('output')}, or the package of before.",
            )
        for name, key in (("layout", "layout"), ("format", "shards")):
            if there.get(key) != now[key]:
                said = option(name) if name == "format" else "The form of its rows"
                raise OptionError(f"{said} of {self.folder} is {there.get(key)}, not {now[key]}.", another)
        before, asked = there.get("question") or {}, json.loads(json.dumps(now["question"]))
        for name in dict.fromkeys([*asked, *before]):
            if before.get(name) != asked.get(name):
                raise OptionError(
                    f"{self.folder} has answers to another question: {option(name)} was "
                    f"{_shown(before.get(name))}, and is {_shown(asked.get(name))} now.",
                    another,
                )

    def _drop_errors(self, path: Path) -> None:
        """Writes a shard again without the rows that failed."""
        rows = list(self._shards.rows(path))
        good = [row for row in rows if not self._layout.failed(row.get(self._layout.status))]
        if not good:
            path.unlink()
        elif len(good) < len(rows):
            _replace(path, self._shards.encode(good))

    def _read_shard(self, path: Path) -> None:
        """Records the ids of a shard's rows."""
        for row in self._shards.heads(path, [self._layout.key, self._layout.status]):
            self._done.add(short_hash(str(row[self._layout.key])))
            self._count(row)

    def _read_journal(self) -> None:
        """Reads the rows that a killed run finished."""
        for row in self._journal_rows():
            key = str(row.get(self._layout.key))
            failed = self._layout.failed(row.get(self._layout.status))
            if not self.done(key) and key not in self._kept and not (failed and self._retry_errors):
                self._kept[key] = row
                self._count(row)

    def _journal_rows(self) -> list[Row]:
        """The rows in the journal, up to a line that was not written completely."""
        path, rows = self.folder / JOURNAL, []
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    row = journal_row(line)
                    if row is None:
                        break
                    rows.append(row)
        return rows

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns an OSError into a VlpackError with a message for the user."""
        try:
            yield
        except OSError as error:
            raise VlpackError(
                f"The output {self.folder} cannot be written: {error.strerror or error}.",
                "Run the same command again when this is repaired: finished rows are kept.",
            ) from error


def _shown(value: Any) -> str:
    """The value of an option in an error message."""
    if value is None:
        return "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 80 else f"{text[:79]}…") if isinstance(value, str) else text[:80]


def _write(descriptor: int, data: bytes) -> None:
    """Writes all bytes to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _replace(path: Path, data: bytes) -> None:
    """Writes a file atomically: neither a reader nor a power failure can find it written in part."""
    partial = path.with_name(f".{path.name.lstrip('.')}.new-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder safe from a power failure, where the system can do so."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(folder: Path) -> list[tuple[int, Path]]:
    """The shards of an output with their numbers, in order."""
    found = [(match, path) for path in folder.iterdir() if (match := _PART.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def read_rows(folder: Path, shards: Format) -> Iterator[Row]:
    """The rows of an output's shards, in order."""
    for _, path in _parts(folder):
        yield from shards.rows(path)
