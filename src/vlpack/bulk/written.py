"""The shards of an output: which rows they have, which of these failed, and what may write into the output's folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from vlpack.bulk.identity import MANIFEST, check_identity, manifest_bytes, manifest_of
from vlpack.bulk.row import short_hash
from vlpack.bulk.shards import Format, Row
from vlpack.bulk.storage import Local, Remote
from vlpack.errors import OptionError, VlpackError, option

LOCK = ".lock"
"""Name of the file that is locked by the run that writes into a folder."""

SHARD_BYTES = 64 * 2**20
"""Size of the rows of a shard, in bytes, at which it is written even if it has fewer rows than usual. This bounds the
memory."""

_PART = re.compile(r"part-(\d{5,})\.(jsonl|parquet)")
_TEMPORARY = re.compile(r"\.(part-\d+\.(jsonl|parquet)|manifest\.json|journal)\.new-[0-9a-f]{8}")
"""Pattern of the names of temporary files, which a run that was killed may leave."""

_AT_ONCE = 16
"""Number of shards at a URI that are read at a time."""


class Layout(NamedTuple):
    """The columns of an output's rows that have a meaning for the output itself.

    Attributes:
        name: name of the layout in the manifest.
        key: column with the row's id.
        status: column that shows whether the row failed.
        fails: function that returns, for the value of that column, whether the row failed.
    """

    name: str
    key: str
    status: str
    fails: Callable[[Any], bool]

    def failed(self, row: Row) -> bool:
        """Whether a row failed."""
        return self.fails(row.get(self.status))

    def id(self, row: Row) -> str:
        """The id of a row."""
        return str(row.get(self.key))


ROWS = Layout("rows", "id", "error", lambda error: error is not None)
"""Layout of rows with the columns of the input and of the answer."""


class Written:
    """The shards of an output that one run at a time writes into.

    Args:
        place: folder of the output.
        layout: meaning of the columns of the rows.
        shards: file format of the shards.
        identity: what all rows have in common: ``package`` and ``question``, as JSON-like data.
        retry_errors: whether rows that failed in earlier runs are answered again.

    Attributes:
        rows: number of rows in the shards, without those that failed and are answered again.
        errors: number of them that failed.
        failed: rows that failed: hash of the id → name of the shard.
        free: number from which on no shard exists.
    """

    def __init__(
        self, place: Local | Remote, layout: Layout, shards: Format, identity: Mapping[str, Any], *, retry_errors: bool
    ) -> None:
        self.place, self.layout, self.shards = place, layout, shards
        self.identity = {"layout": layout.name, "shards": shards.suffix[1:], **identity}
        self.retry_errors = retry_errors
        self.rows = self.errors = self.free = 0
        self.failed: dict[bytes, str] = {}
        self._done: set[bytes] = set()
        self._taken: set[int] = set()
        self._lock: FileLock | None = None
        self._runs: list[Any] = []

    def lock(self) -> None:
        """Creates the folder and locks it, so that no other run writes into it; folders at URIs have no lock.

        Raises:
            OptionError: the folder is something else, or is in use.
        """
        self._check_place()
        if isinstance(self.place, Remote):
            return
        self.place.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.place.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._lock = None
            raise OptionError(
                f"Another run of vlpack batch writes into {self.place.name}.", "Wait for its end."
            ) from None

    def unlock(self) -> None:
        """Ends the lock of the folder, if it is locked."""
        if self._lock is not None:
            self._lock.release()

    def read(self, *, more: bool = False) -> None:
        """Reads the manifest and the ids of all rows, and removes temporary files of runs that were killed.

        Args:
            more: whether the output has rows that are in no shard.

        Raises:
            OptionError: the output belongs to another package or question.
            VlpackError: a file of the output is damaged.
        """
        names = [name for name in self.place.names() if "/" not in name]
        parts = sorted((int(found[1]), name) for name in names if (found := _PART.fullmatch(name)))
        there: dict[str, Any] = {}
        if MANIFEST in names:
            with self.place.open(MANIFEST) as file:
                there = manifest_of(file.read(), f"{self.place.name}/{MANIFEST}")
        if there and (parts or more):  # otherwise no row has an answer to another question
            check_identity(self.place.name, there, self.identity)
        self._runs = there.get("runs", [])
        for name in names:
            if _TEMPORARY.fullmatch(name):
                self.place.remove(name)
        for name, rows in self._heads([name for _, name in parts]):
            for row in rows:
                self._note(row, name)
        self.free = parts[-1][0] + 1 if parts else 0
        self._taken = {number for number, _ in parts}

    def _heads(self, names: list[str]) -> Iterator[tuple[str, Iterator[Row]]]:
        """The ids and states of the rows of shards."""
        columns = [self.layout.key, self.layout.status]
        if isinstance(self.place, Local):
            yield from ((name, self.shards.heads(self.place, name, columns)) for name in names)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda name: list(self.shards.heads(self.place, name, columns)), names)
            yield from zip(names, map(iter, found), strict=True)

    def _note(self, row: Row, name: str) -> None:
        """Notes that a row is in a shard."""
        key = short_hash(self.layout.id(row))
        self._done.add(key)
        if self.layout.failed(row):
            self.failed[key] = name
            if self.retry_errors:  # counted when it has been answered again, or at the end
                return
        self.count(row)

    def begin(self, run: Mapping[str, Any]) -> None:
        """Records a run in the manifest; the folder of an output at a URI comes into being.

        Args:
            run: what the manifest records about the run, as JSON-like data.
        """
        self.place.write(MANIFEST, manifest_bytes(self.identity, [*self._runs, dict(run)]))

    def done(self, key: str) -> bool:
        """Whether the row with this id is in a shard, and is not answered again."""
        name = short_hash(key)
        return name in self._done and not (self.retry_errors and name in self.failed)

    def write(self, rows: list[Row], number: int) -> None:
        """Writes a new shard.

        Args:
            rows: rows of the shard.
            number: number of the shard.
        """
        self.place.write(self.part(number), self.shards.encode(rows))
        self._done.update(short_hash(self.layout.id(row)) for row in rows)
        self.free = max(self.free, number + 1)

    def repair(self, name: str, rows: Mapping[str, Row]) -> None:
        """Writes a shard again with new rows in place of those that had failed.

        Args:
            name: name of the shard.
            rows: new rows by their ids.
        """
        repair(self.place, self.shards, self.layout, name, rows)

    def repaired(self, keys: Iterable[str]) -> None:
        """Notes that rows that had failed were answered again."""
        for key in keys:
            self.failed.pop(short_hash(key), None)

    def count_failed(self) -> None:
        """Counts the rows that should have been answered again and were not, at the end of a limited run."""
        if self.retry_errors:
            self.rows += len(self.failed)
            self.errors += len(self.failed)

    def part(self, number: int) -> str:
        """The name of the shard with a number."""
        return f"part-{number:05}{self.shards.suffix}"

    def numbers(self) -> Iterator[int]:
        """The numbers of new shards: first those that a killed run has left out, so that rows stay in order."""
        yield from (number for number in range(self.free) if number not in self._taken)
        number = self.free
        while True:
            yield number
            number += 1

    def count(self, row: Row) -> None:
        """Counts a finished row, and whether it failed."""
        self.rows += 1
        self.errors += self.layout.failed(row)

    def _check_place(self) -> None:
        """Raises an OptionError if the folder is neither new nor empty nor an output of a batch."""
        name = self.place.name
        folder = self.place.folder if isinstance(self.place, Local) else None
        ending = next((end for end in (".jsonl", ".parquet", ".json") if name.endswith(end)), None)
        if ending is not None and not (folder is not None and folder.is_dir()):
            raise OptionError(
                f"{option('output')} is {name}, but the output is a folder of files.",
                f"Give a folder: {option('output', name.removesuffix(ending))}.",
            )
        if folder is not None:
            if not folder.exists() or (folder / MANIFEST).is_file():
                return
            if not folder.is_dir():
                raise OptionError(f"{name} exists and is not a folder.", f"Choose another {option('output')}.")
            there = [path.name for path in folder.iterdir()]
        else:
            there = list(self.place.names())
            if MANIFEST in there:
                return
        others = [one for one in there if one != LOCK and not _TEMPORARY.fullmatch(one)]
        if others:
            raise OptionError(
                f"{name} exists and is not an output of vlpack batch: it contains {sorted(others)[0]!r}.",
                f"Choose another {option('output')}.",
            )

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turns an OSError into a VlpackError with a message for the user."""
        try:
            yield
        except OSError as error:
            raise VlpackError(
                f"The output {self.place.name} cannot be written: {error.strerror or error}.",
                "Run the same command again when this is repaired: finished rows are kept.",
            ) from error


def repair(place: Local | Remote, shards: Format, layout: Layout, name: str, rows: Mapping[str, Row]) -> None:
    """Writes a shard again with new rows in place of those with the same ids.

    Args:
        place: folder of the output.
        shards: file format of the shard.
        layout: meaning of the columns of the rows.
        name: name of the shard.
        rows: new rows by their ids.
    """
    whole = [rows.get(layout.id(row), row) for row in shards.rows(place, name)]
    place.write(name, shards.encode(whole))
