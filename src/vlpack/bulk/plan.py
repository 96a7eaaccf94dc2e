"""Plans which rows of an input become which shards, for runs whose shards are made by many processes.

The ids of all rows are computed first, portion by portion, by any number of processes. Then one process goes through
them in the order of the input, numbers equal ones, leaves out those that are in the output already, and divides the
rest into units. A unit has the rows of one shard. It can be read and answered anywhere and any number of times: its
rows, their ids and the name of the shard stay the same.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.bulk.answering import held_bytes
from vlpack.bulk.row import Ids, Mark, Portion, Task, numbered, short_hash
from vlpack.bulk.written import SHARD_BYTES, Written
from vlpack.errors import InputError


class Index(NamedTuple):
    """The ids of a portion's rows.

    Attributes:
        names: ids without the numbers that make them unique.
        marks: marks of the rows, of shape [rows, 2].
        sizes: estimates of the memory that the rows take, in bytes, of shape [rows].
    """

    names: list[str]
    marks: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def index_of(portion: Portion, ids: Ids) -> Index:
    """Computes the ids of a portion's rows; of a table whose rows all have a key, only the keys are read.

    Raises:
        InputError: the portion cannot be read.
    """
    keys = portion.column(ids.column)
    if keys is not None and keys[0] and all(key not in (None, "") for key in keys[0]):
        values, size = keys
        places = np.arange(len(values), dtype=np.int64)
        names = [ids.key_name(value) for value in values]
        return Index(names, np.stack([places, 0 * places], axis=1), np.full(len(values), size, np.int64))
    names, marks, sizes = [], [], []
    for mark, item in portion.read():
        names.append(ids.name(item)[0])
        marks.append(mark)
        sizes.append(held_bytes(item))
    return Index(names, np.array(marks, np.int64).reshape(-1, 2), np.array(sizes, np.int64))


class Piece(NamedTuple):
    """The rows of a unit that are in one portion.

    Attributes:
        portion: the portion.
        start: mark of the first row.
        rows: places of the rows, counted from the first one.
        numbers: numbers of the rows with equal ids, by these places; other rows have the number 1.
    """

    portion: Portion
    start: Mark
    rows: list[int]
    numbers: dict[int, int]


class Unit(NamedTuple):
    """The rows of one shard.

    Attributes:
        shard: name of the shard.
        pieces: the rows, in order.
        digest: hash of their ids.
        repairs: whether the shard exists, and the rows replace those that failed.
    """

    shard: str
    pieces: list[Piece]
    digest: bytes
    repairs: bool

    def tasks(self, ids: Ids) -> list[Task]:
        """Reads the rows.

        Args:
            ids: the function that names rows; its numbers are not used.

        Raises:
            InputError: the input cannot be read, or is another one than when the unit was planned.
        """
        tasks: list[Task] = []
        for piece in self.pieces:
            wanted, last = set(piece.rows), piece.rows[-1]
            for place, (_, item) in enumerate(itertools.islice(piece.portion.read(piece.start), last + 1)):
                if place in wanted:
                    (name, keyed), number = ids.name(item), piece.numbers.get(place, 1)
                    checked = ids.checked(item, name, keyed, number)
                    tasks.append(Task(len(tasks), numbered(name, number), checked))
        if _digest(task.key for task in tasks) != self.digest:
            raise InputError("The input has changed since the run began.", "Run the same command again.")
        return tasks


class _Growing:
    """A unit to which rows are added."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Piece]] = []
        self.keys: list[str] = []
        self.bytes = 0

    def add(self, at: int, portion: Portion, index: Index, row: int, number: int) -> None:
        """Adds a row of the portion with number ``at``."""
        if not self.pieces or self.pieces[-1][0] != at:
            self._first = row
            start = int(index.marks[row, 0]), int(index.marks[row, 1])
            self.pieces.append((at, Piece(portion, start, [], {})))
        piece = self.pieces[-1][1]
        piece.rows.append(row - self._first)
        if number != 1:
            piece.numbers[row - self._first] = number
        self.keys.append(numbered(index.names[row], number))
        self.bytes += int(index.sizes[row])

    def unit(self, shard: str, *, repairs: bool) -> Unit:
        """The unit with these rows."""
        return Unit(shard, [piece for _, piece in self.pieces], _digest(self.keys), repairs)


def plan(
    indexed: Iterable[tuple[Portion, Index]], ids: Ids, written: Written, shard_rows: int, limit: int | None
) -> tuple[list[Unit], int]:
    """Divides the rows that must be answered into units.

    Args:
        indexed: portions of the input with the ids of their rows, in order.
        ids: function that numbers equal ids.
        written: the rows that are in the output.
        shard_rows: largest number of rows of a shard.
        limit: number of rows from the beginning of the input that are answered; None for all.

    Returns:
        The units, and the number of rows of the input up to the limit.
    """
    units: list[Unit] = []
    numbers = written.numbers()
    growing = _Growing()
    repairs: dict[str, _Growing] = {}
    total = 0
    for at, (portion, index, row) in _rows(indexed):
        if total == limit:
            break
        total += 1
        name = index.names[row]
        number = ids.number(name)
        key = numbered(name, number)
        if written.done(key):
            continue
        shard = written.failed.get(short_hash(key))
        if shard is not None:
            repairs.setdefault(shard, _Growing()).add(at, portion, index, row, number)
            continue
        if growing.keys and (len(growing.keys) >= shard_rows or growing.bytes + index.sizes[row] > SHARD_BYTES):
            units.append(growing.unit(written.part(next(numbers)), repairs=False))
            growing = _Growing()
        growing.add(at, portion, index, row, number)
    if growing.keys:
        units.append(growing.unit(written.part(next(numbers)), repairs=False))
    return [*(one.unit(shard, repairs=True) for shard, one in repairs.items()), *units], total


def _rows(indexed: Iterable[tuple[Portion, Index]]) -> Iterator[tuple[int, tuple[Portion, Index, int]]]:
    """The rows of all portions, each with the number of its portion."""
    for at, (portion, index) in enumerate(indexed):
        for row in range(len(index.names)):
            yield at, (portion, index, row)


def _digest(keys: Iterable[str]) -> bytes:
    """A hash of the ids of a unit's rows."""
    made: Any = hashlib.blake2b(digest_size=16)
    for key in keys:
        made.update(short_hash(key))
    return bytes(made.digest())
