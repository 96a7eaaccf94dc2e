"""Tables as inputs: Parquet files, and folders of Hugging Face data sets, read row by row with pyarrow."""

from __future__ import annotations

import datetime
import decimal
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlpack.bulk.row import Item
from vlpack.errors import InputError, OptionError

ROWS = 32
"""Number of rows that are read at a time; it is small because rows may hold images."""


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


class Tables:
    """A table in one or more files with the same columns, as a source of rows.

    Args:
        paths: Parquet files, or Arrow files as ``Dataset.save_to_disk`` of Hugging Face's datasets writes them.

    Attributes:
        total: number of rows; None if it is not known until all are read.
        types: pyarrow types of the columns.

    Raises:
        OptionError: pyarrow is not installed.
        InputError: a file is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._arrow = pyarrow(f"The input {paths[0].name}")
        self._paths = paths
        self.total: int | None = 0
        for place, path in enumerate(paths):
            try:
                schema, rows = self._head(path)
            except (self._arrow.ArrowException, OSError) as error:
                raise InputError(f"{path} cannot be read: {str(error)[:200]}.") from None
            if place == 0:
                self.types: dict[str, Any] = {one.name: one.type for one in schema}
            self.total = None if self.total is None or rows is None else self.total + rows

    def __iter__(self) -> Iterator[Item]:
        for path in self._paths:
            number = 0
            try:
                for batch in self._batches(path):
                    for columns in batch.to_pylist():
                        number += 1
                        yield Item(_plain(columns), f"{path.name}, row {number}")
            except (self._arrow.ArrowException, OSError) as error:
                raise InputError(f"{path} cannot be read after row {number}: {str(error)[:200]}.") from None

    def _head(self, path: Path) -> tuple[Any, int | None]:
        """The schema of a file, and its number of rows; None if the file does not store it."""
        from pyarrow import ipc, parquet

        if path.suffix == ".arrow":
            with self._arrow.OSFile(str(path)) as file, ipc.open_stream(file) as stream:
                return stream.schema, None
        with parquet.ParquetFile(path) as table:
            return table.schema_arrow, table.metadata.num_rows

    def _batches(self, path: Path) -> Iterator[Any]:
        """Yields the rows of a file in record batches of at most `ROWS` rows."""
        from pyarrow import ipc, parquet

        if path.suffix == ".arrow":
            with self._arrow.OSFile(str(path)) as file, ipc.open_stream(file) as stream:
                for batch in stream:
                    for start in range(0, batch.num_rows, ROWS):
                        yield batch.slice(start, ROWS)
        else:
            with parquet.ParquetFile(path) as table:
                yield from table.iter_batches(ROWS)


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
