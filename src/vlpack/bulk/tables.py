"""Tables as inputs: Parquet files, and folders of Hugging Face data sets, read row by row with pyarrow."""

from __future__ import annotations

import contextlib
import datetime
import decimal
from collections.abc import Callable, Iterator
from typing import Any

from vlpack.bulk.row import Item, Mark
from vlpack.bulk.storage import Storage, pyarrow
from vlpack.errors import InputError

ROWS = 32
"""Number of rows that are read at a time; it is small because rows may hold images."""


def kept_type(given: Any) -> Any:
    """The pyarrow type as which a column of the given pyarrow type is written: text for types that JSON lacks."""
    arrow = pyarrow("Parquet")
    types = arrow.types
    if types.is_dictionary(given):
        return kept_type(given.value_type)
    if types.is_list(given) or types.is_large_list(given) or types.is_fixed_size_list(given):
        return arrow.list_(kept_type(given.value_type))
    if types.is_struct(given):
        return arrow.struct([(one.name, kept_type(one.type)) for one in given])
    tests = ("boolean", "integer", "floating", "string", "large_string", "binary", "large_binary", "null")
    return given if any(getattr(types, f"is_{name}")(given) for name in tests) else arrow.string()


class Table:
    """A file of a table, which is read row by row.

    Args:
        storage: folder of the file.
        name: name of a Parquet file, or of an Arrow file as ``Dataset.save_to_disk`` of Hugging Face's datasets writes
            it.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def head(self) -> tuple[dict[str, Any], int | None]:
        """The pyarrow types of the columns, and the number of rows; None if the file does not store it.

        Raises:
            OptionError: pyarrow is not installed.
            InputError: the file is damaged.
        """
        with self._opened("cannot be read") as (stream, table):
            schema = table.schema_arrow if stream is None else stream.schema
            return {one.name: one.type for one in schema}, None if table is None else table.metadata.num_rows

    def read(self, start: Mark = (0, 0)) -> Iterator[tuple[Mark, Item]]:
        """Iterates over the rows from a mark on, which is the number of a row and 0."""
        first = number = start[0]
        with self._opened(lambda: f"cannot be read after row {number}") as (stream, table):
            for batch in self._batches(stream, table, first, None):
                for columns in batch.to_pylist():
                    number += 1
                    yield (number - 1, 0), Item(_plain(columns), f"{self._name.rpartition('/')[2]}, row {number}")

    def column(self, name: str) -> tuple[list[Any], int] | None:
        """All values of a column, and the mean size of a row in bytes; None if that needs all columns to be read."""
        with self._opened("cannot be read") as (_, table):
            if table is None or name not in table.schema_arrow.names:
                return None
            data = table.metadata
            size = sum(data.row_group(place).total_byte_size for place in range(data.num_row_groups))
            values = [_plain(one) for batch in table.iter_batches(4096, columns=[name]) for one in batch[0].to_pylist()]
            return values, size // max(1, data.num_rows)

    def _batches(self, stream: Any, table: Any, first: int, columns: list[str] | None) -> Iterator[Any]:
        """Yields the rows from number ``first`` on, in record batches of at most `ROWS` rows."""
        if table is None:
            found = (batch.slice(place, ROWS) for batch in stream for place in range(0, batch.num_rows, ROWS))
        else:
            sizes = [table.metadata.row_group(place).num_rows for place in range(table.metadata.num_row_groups)]
            skipped = 0
            while skipped < len(sizes) and first >= sizes[skipped]:  # row groups before the first row are not read
                first -= sizes[skipped]
                skipped += 1
            groups = list(range(skipped, len(sizes)))
            found = table.iter_batches(ROWS, row_groups=groups, columns=columns) if groups else iter(())
        for batch in found:
            if first < batch.num_rows:
                yield batch.slice(first)
            first = max(0, first - batch.num_rows)

    @contextlib.contextmanager
    def _opened(self, what: str | Callable[[], str]) -> Iterator[tuple[Any, Any]]:
        """Yields a reader of Arrow's stream or else of Parquet; ``what`` says what failed, for the InputError."""
        arrow = pyarrow(f"The input {self._name}")
        from pyarrow import ipc, parquet

        try:
            with self._storage.open(self._name) as file:
                if self._name.endswith(".arrow"):
                    with ipc.open_stream(file) as stream:
                        yield stream, None
                else:
                    with parquet.ParquetFile(file) as table:
                        yield None, table
        except (arrow.ArrowException, OSError) as error:
            said = what if isinstance(what, str) else what()
            raise InputError(f"{self._storage.name}/{self._name} {said}: {str(error)[:200]}.") from None


def _plain(value: Any) -> Any:
    """A value that pyarrow returned as JSON-like data and bytes: dates, times and decimals become text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str | bytes) else str(value)
