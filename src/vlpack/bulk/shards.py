"""The file formats of an output's shards, JSON lines and Parquet. A shard is encoded in memory as a whole."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from vlpack.bulk.row import RESULT, valid_text
from vlpack.bulk.storage import Storage, pyarrow
from vlpack.bulk.tables import kept_type
from vlpack.errors import OptionError, VlpackError, option

Row = dict[str, Any]
"""A row of an output: its id, the columns of the input, and the columns of the answer."""

_BYTES = "$vlpack.bytes"
_OBJECT = "$vlpack.object"
"""Keys of objects in the journal, which is JSON: one that stands for bytes, and one around an object that looks so."""


class Format(Protocol):
    """The interface of a file format of shards.

    Attributes:
        suffix: ending of a shard's file name.
    """

    suffix: str

    def encode(self, rows: Sequence[Row]) -> bytes:
        """The bytes of a shard with these rows."""
        ...

    def rows(self, storage: Storage, name: str) -> Iterator[Row]:
        """The rows of a shard, one by one.

        Raises:
            VlpackError: the file is damaged.
        """
        ...

    def heads(self, storage: Storage, name: str, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a shard with only some of their columns, which is faster to read; raises the errors of `rows`."""
        ...


class JsonLines:
    """The format JSON lines in UTF-8: a JSON object for each row. Bytes become null, because JSON cannot hold them."""

    suffix = ".jsonl"

    def encode(self, rows: Sequence[Row]) -> bytes:
        """The bytes of a shard with these rows."""
        return b"".join(_line(row) for row in rows)

    def rows(self, storage: Storage, name: str) -> Iterator[Row]:
        """The rows of a shard, one by one; raises a VlpackError if the file is damaged."""
        with storage.open(name) as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise _damaged(storage, name, f"line {number} is not a JSON object")
                yield row

    def heads(self, storage: Storage, name: str, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a shard with only some of their columns."""
        for row in self.rows(storage, name):
            yield {column: row.get(column) for column in columns}


class Parquet:
    """The format Parquet, written by pyarrow.

    Columns of the answer have the same types in every shard. A column of the input keeps its type if the input is
    Parquet; otherwise the type is inferred from the rows of the shard, and a column whose values have different types,
    or a type that Parquet does not have, becomes text in JSON. Halves of surrogate pairs are written as escapes.

    Args:
        types: pyarrow types of the columns whose types are known.

    Raises:
        OptionError: pyarrow is not installed.
    """

    suffix = ".parquet"

    def __init__(self, types: Mapping[str, Any]) -> None:
        self._arrow = pyarrow(option("format", "parquet"))
        self._types = {**types, "id": self._arrow.string(), **dict.fromkeys(RESULT, self._arrow.string())}
        self._types |= {name: self._arrow.int64() for name in RESULT if name.endswith("_tokens")}
        self._types |= {name: self._arrow.float64() for name in RESULT if name.endswith("_seconds")}

    def encode(self, rows: Sequence[Row]) -> bytes:
        """The bytes of a shard with these rows."""
        from pyarrow import parquet

        names = dict.fromkeys(name for row in rows for name in row)
        columns = {valid_text(name): self._column(name, [row.get(name) for row in rows]) for name in names}
        made = io.BytesIO()
        parquet.write_table(self._arrow.table(columns), made, compression="zstd")
        return made.getvalue()

    def _column(self, name: str, values: list[Any]) -> Any:
        """A column as a pyarrow array: of its known or inferred type, or else as JSON text."""
        known = self._types.get(name)
        try:
            made = self._arrow.array(values, type=None if known is None else kept_type(known))
            if not self._has_empty_struct(made.type):
                return made
        except (self._arrow.ArrowException, TypeError, ValueError, OverflowError):
            pass
        texts = [value if value is None or isinstance(value, str) else _text(value) for value in values]
        return self._arrow.array([text and valid_text(text) for text in texts], type=self._arrow.string())

    def _has_empty_struct(self, given: Any) -> bool:
        """Whether a type has an object without any fields, which Parquet cannot hold."""
        if self._arrow.types.is_struct(given) and given.num_fields == 0:
            return True
        return any(self._has_empty_struct(given.field(place).type) for place in range(given.num_fields))

    def rows(self, storage: Storage, name: str) -> Iterator[Row]:
        """The rows of a shard, one by one; raises a VlpackError if the file is damaged."""
        yield from self._read(storage, name, None)

    def heads(self, storage: Storage, name: str, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a shard with only some of their columns."""
        yield from self._read(storage, name, list(columns))

    def _read(self, storage: Storage, name: str, columns: list[str] | None) -> Iterator[Row]:
        from pyarrow import parquet

        try:
            with storage.open(name) as file, parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(256, columns=columns):
                    yield from batch.to_pylist()
        except (self._arrow.ArrowException, OSError) as error:
            raise _damaged(storage, name, str(error)[:200]) from None


def format_of(name: str, types: Mapping[str, Any]) -> Format:
    """The format with a name, ``jsonl`` or ``parquet``.

    Args:
        name: name of the format.
        types: pyarrow types of the columns whose types are known.

    Raises:
        OptionError: there is no such format, or pyarrow is not installed.
    """
    if name == "jsonl":
        return JsonLines()
    if name == "parquet":
        return Parquet(types)
    raise OptionError(f"{option('format')} is {name!r}; it must be jsonl or parquet.")


def _line(row: Row) -> bytes:
    """A row as a line of JSON in UTF-8."""
    value = plain(row)
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(value).encode() + b"\n"


def plain(value: Any) -> Any:
    """A value restricted to what JSON can represent: bytes, infinity and NaN become None."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _text(value: Any) -> str:
    """A value as JSON text."""
    return json.dumps(plain(value), ensure_ascii=False)


def journal_line(row: Row) -> bytes:
    """A row as a line of the journal: JSON in ASCII, with bytes as base64."""
    return json.dumps(_held(row)).encode() + b"\n"


def _held(value: Any) -> Any:
    """A value as JSON-like data without bytes, from which `_unheld` makes the value again."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, dict):
        made = {name: _held(item) for name, item in value.items()}
        # an object that only looks like bytes is marked as an object, and so is an object that looks like such a mark
        return {_OBJECT: made} if len(value) == 1 and value.keys() <= {_BYTES, _OBJECT} else made
    return [_held(item) for item in value] if isinstance(value, list | tuple) else value


def _unheld(value: Any) -> Any:
    """The value that `_held` was given."""
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        if value.keys() == {_OBJECT}:
            value = value[_OBJECT]
        return {name: _unheld(item) for name, item in value.items()}
    return [_unheld(item) for item in value] if isinstance(value, list) else value


def journal_row(line: bytes) -> Row | None:
    """The row in a line of the journal; None if the line is incomplete or damaged."""
    try:
        row = _unheld(json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _damaged(storage: Storage, name: str, why: str) -> VlpackError:
    return VlpackError(
        f"{storage.name}/{name} is damaged: {why}.", "Remove this file, and its rows will be answered again."
    )
