"""Files of JSON lines as inputs: a row for each line. A line that cannot be used becomes a row with an error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from vlpack.bulk.row import Item, Mark
from vlpack.bulk.storage import Storage
from vlpack.errors import InputError

MAX_LINE = 2**28
"""Largest length of a line of JSON, in bytes: 256 MiB."""

MAX_DEPTH = 64
"""Largest number of arrays and objects inside each other in a row; functions that call themselves read them."""


class Lines:
    """A file of JSON lines, which is read line by line.

    Args:
        storage: folder of the file.
        name: name of the file.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def count(self) -> int:
        """The number of lines that are not empty."""
        count = 0
        with self._storage.open(self._name) as file:
            while line := file.readline(1 << 20):
                blank = not line.strip()
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    blank = blank and not line.strip()
                count += not blank
        return count

    def read(self, start: Mark = (0, 0)) -> Iterator[tuple[Mark, Item]]:
        """Iterates over the rows from a mark on: a line's place in bytes, and the number of lines before it."""
        try:
            with self._storage.open(self._name) as file:
                place, number = start
                file.seek(place)
                while line := file.readline(MAX_LINE + 1):
                    mark = place, number
                    place += len(line)
                    number += 1
                    where = f"{self._name.rpartition('/')[2]}, line {number}"
                    if len(line) > MAX_LINE:
                        while line and not line.endswith(b"\n"):
                            line = file.readline(1 << 20)
                            place += len(line)
                        error = InputError(f"{where} has more than {MAX_LINE} bytes.")
                        yield mark, Item({}, where, where, error=error)
                    elif line.strip():
                        yield mark, _item(line, where)
        except OSError as error:
            raise InputError(
                f"{self._storage.name}/{self._name} cannot be read: {error.strerror or str(error)[:200]}."
            ) from None

    def column(self, name: str) -> None:
        """None, because a column cannot be read without the others."""


def _deeper(value: Any, depth: int) -> bool:
    """Whether a value has more than ``depth`` arrays and objects inside each other."""
    inner: Iterable[Any] | None = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return inner is not None and (depth == 0 or any(_deeper(one, depth - 1) for one in inner))


def _item(line: bytes, where: str) -> Item:
    """The row in a line of JSON; ``where`` names the line in messages."""

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        columns = json.loads(line.decode("utf-8-sig"), parse_constant=constant)
        if _deeper(columns, MAX_DEPTH):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {str(error)[:200]}"
        text = line[:2000].decode("utf-8", "replace").rstrip("\n")
        return Item({"line": text}, where, error=InputError(f"{where} {why}."))
    if not isinstance(columns, dict):
        wrong = InputError(f"{where} is no JSON object.", 'A line is {"image": "a.png", "prompt": "…"}, for example.')
        return Item({"line": columns}, where, error=wrong)
    return Item(columns, where)
