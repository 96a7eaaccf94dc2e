"""The output of a batch: a folder of shards, which are written atomically, and a manifest that records the question.

Every finished row is first appended to a journal. When enough consecutive rows of the input are finished, they are
written to a temporary file, which is renamed to become the next shard. Then the journal is replaced by one with the
remaining rows. If a run is killed between these two steps, some rows are in both; the next run keeps those in the shard
and drops them from the journal. So a killed run loses only the rows that were being answered, and no row is written
twice.

A row that failed stays in its shard until it has been answered again; then the shard is written again with the answer
in its place.

A folder has these files:

- ``manifest.json``: the package and the question, which are the same for all rows, and the runs that wrote rows;
- ``part-00000.jsonl`` (or ``.parquet``) and so on: the rows, in the order of the input;
- ``.journal``: finished rows that are in no shard yet; it exists only until a run is complete;
- ``.lock``: a file that is locked by the run that writes into the folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlpack.bulk.row import short_hash
from vlpack.bulk.shards import Format, Row, journal_line, journal_row
from vlpack.bulk.storage import Local, replace_file, sync_folder, write_all
from vlpack.bulk.written import SHARD_BYTES, Layout, Written

JOURNAL = ".journal"
"""Name of the file with the finished rows that are in no shard."""

SYNC_SECONDS = 1.0
"""Longest time in seconds until a row in the journal is also safe from a power failure."""


class Output:
    """The output of a batch, which one run at a time writes into. Use it as a context manager.

    Args:
        folder: folder of the output; it is created, or continues an earlier run.
        layout: meaning of the columns of the rows.
        shards: file format of the shards.
        identity: what all rows have in common: ``package`` and ``question``, as JSON-like data.
        run: what the manifest records about this run, as JSON-like data.
        shard_rows: number of rows of a shard.
        retry_errors: whether rows that failed in earlier runs are answered again.

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
        self.folder, self._layout, self._shard_rows = folder, layout, shard_rows
        self._written = Written(Local(folder), layout, shards, identity, retry_errors=retry_errors)
        self._run = run
        self._kept: dict[str, Row] = {}  # rows of the journal that the input has not come to yet
        self._old: dict[str, Row] = {}  # rows of the journal that failed and are answered again
        self._repairs: dict[str, dict[str, Row]] = {}  # new rows for those that failed, by shard and id
        self._repair_bytes = 0
        self._waiting: dict[int, tuple[Row, int] | None] = {}
        self._ready: list[tuple[Row, int]] = []
        self._next = self._bytes = self._journal = 0
        self._synced = time.monotonic()
        self._open = False

    @property
    def rows(self) -> int:
        """The number of rows in the output, without those that failed in earlier runs and are answered again."""
        return self._written.rows

    @property
    def errors(self) -> int:
        """The number of these rows that failed."""
        return self._written.errors

    def __enter__(self) -> Output:
        try:
            with self._written.told():
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
        self._written.unlock()

    def done(self, key: str) -> bool:
        """Whether the row with this id is in a shard, and is not answered again."""
        return self._written.done(key)

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
        self._written.count(row)
        with self._written.told():
            write_all(self._journal, line)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._journal)
                self._synced = time.monotonic()
        self._old.pop(self._layout.id(row), None)
        self._waiting[place] = None if self._repaired(row, len(line)) else (row, len(line))
        self._cut()

    def finish(self) -> None:
        """Writes all finished rows into shards and removes the journal."""
        with self._written.told():
            self._ready += [row for _, row in sorted(self._waiting.items()) if row is not None]
            self._waiting.clear()
            for row in self._old.values():  # not answered again, because the run was limited or stopped early
                self._written.count(row)
            left = [*self._kept.values(), *self._old.values()]  # also rows that the input no longer has
            self._ready += [(row, 0) for row in left]
            self._kept.clear()
            self._old.clear()
            while self._ready:
                self._write_shard(self._size())
            self._write_repairs()
            self._written.count_failed()
            os.close(self._journal)
            self._open = False
            (self.folder / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.folder)

    def _repaired(self, row: Row, size: int) -> bool:
        """Whether a row takes the place of one in a shard that failed; if so, it is put there later."""
        key = self._layout.id(row)
        name = self._written.failed.pop(short_hash(key), None)
        if name is not None:
            self._repairs.setdefault(name, {})[key] = row
            self._repair_bytes += size
        return name is not None

    def _write_repairs(self) -> None:
        """Writes the shards again whose failed rows have been answered."""
        for name, rows in self._repairs.items():
            self._written.repair(name, rows)
        self._repairs.clear()
        self._repair_bytes = 0

    def _cut(self) -> None:
        """Writes shards while there are enough finished rows in the order of the input."""
        while self._next in self._waiting:
            row = self._waiting.pop(self._next)
            self._next += 1
            if row is not None:
                self._ready.append(row)
                self._bytes += row[1]
        while len(self._ready) >= self._shard_rows or self._bytes >= SHARD_BYTES:
            with self._written.told():
                self._write_shard(self._size())
                self._new_journal()
        if self._repair_bytes >= SHARD_BYTES:
            with self._written.told():
                self._write_repairs()
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
        self._written.write(rows, self._written.free)

    def _new_journal(self) -> None:
        """Replaces the journal by one with the rows that are in no shard."""
        waiting = [one[0] for one in (*self._ready, *self._waiting.values()) if one is not None]
        repairs = [row for rows in self._repairs.values() for row in rows.values()]
        lines = map(journal_line, (*waiting, *repairs, *self._kept.values(), *self._old.values()))
        if self._open:  # before it is replaced, because Windows replaces no open file
            os.close(self._journal)
            self._open = False
        replace_file(self.folder / JOURNAL, b"".join(lines))
        self._journal = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        self._open = True

    def _prepare(self) -> None:
        """Locks the folder, reads the rows that earlier runs have finished, and removes their temporary files."""
        self._written.lock()
        rows = self._journal_rows()
        self._written.read(more=bool(rows))
        self._read_journal(rows)
        self._written.begin(self._run)
        self._new_journal()

    def _read_journal(self, rows: list[Row]) -> None:
        """Takes over the rows that a killed run finished."""
        newest = {self._layout.id(row): row for row in rows}  # a row that was answered again is there twice
        for key, row in newest.items():
            failed = self._layout.failed(row)
            if short_hash(key) in self._written.failed:
                if not failed:
                    if not self._written.retry_errors:  # the failed row was counted
                        self._written.rows -= 1
                        self._written.errors -= 1
                    self._written.count(row)
                    self._repaired(row, len(journal_line(row)))
            elif self._written.done(key):
                continue
            elif failed and self._written.retry_errors:
                self._old[key] = row
            else:
                self._kept[key] = row
                self._written.count(row)

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
