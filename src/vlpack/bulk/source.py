"""Inputs of a batch: finding the input that a user names, and reading its rows one by one while others are answered."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vlpack.bulk.files import Files, kind_of
from vlpack.bulk.row import Item
from vlpack.bulk.tables import Tables
from vlpack.errors import InputError, OptionError, option

MAX_LINE = 2**28
"""Largest length of a line of JSON, in bytes: 256 MiB."""

MAX_DEPTH = 64
"""Largest number of arrays and objects inside each other in a row; functions that call themselves read them."""

LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
"""Endings of the names of files with JSON lines, and of files with tables."""

_KINDS = "a folder or pattern of images, videos and PDFs, a file .jsonl or .parquet, or a folder of a data set"
"""The kinds of inputs, for messages."""


class Source(NamedTuple):
    """An input that was found.

    Attributes:
        name: name of its kind: ``files``, ``jsonl``, ``openai`` or ``table``.
        items: function that iterates over the rows, from the beginning.
        folder: folder in which the files that rows name must be.
        total: number of rows; None if it is not known until all are read.
        types: pyarrow types of the columns; empty if they are not known.
    """

    name: str
    items: Callable[[], Iterator[Item]]
    folder: str
    total: int | None
    types: dict[str, Any]


def open_source(given: str, files: str | None = None, output: str | None = None) -> Source:
    """Finds an input.

    Args:
        given: a folder, a pattern, or a file.
        files: folder in which the files that rows name must be; None for the folder of the input.
        output: folder of the output, whose files are no input, even if it lies in the folder of the input.

    Raises:
        InputError: there is no such input, or it has no rows.
        OptionError: it has files of different kinds, or a library that it needs is not installed.
    """
    if files is not None and not os.path.isdir(os.path.expanduser(files)):
        raise OptionError(f"{option('files')} is {files}, which is not a folder.")
    if "://" in given[:16]:
        raise InputError(f"{given} is a URL, which is not read.", f"Give {_KINDS}.")
    place = os.path.expanduser(given)
    if os.path.isdir(place):
        return _folder(Path(place), files, output)
    if os.path.isfile(place):
        return _paths(given, [Path(place)], str(Path(place).parent), files)
    if glob.has_magic(place):
        matches = (Path(path) for path in glob.iglob(place, recursive=True) if os.path.isfile(path))
        found = _outside(matches, output)
        if not found:
            raise InputError(f"No file matches the pattern {given}.", "A pattern may contain *, ?, [a-z] and **.")
        return _paths(given, found, _fixed(place), files)
    raise InputError(f"There is no file or folder {given}.", f"Give {_KINDS}.")


def _fixed(pattern: str) -> str:
    """The folder before the first special character of a pattern."""
    parts = Path(pattern).parts
    end = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:end])) if end else "."


def _outside(paths: Iterable[Path], output: str | None) -> list[Path]:
    """The sorted paths of files that are not directly in the folder of the output."""
    place = None if output is None else os.path.realpath(output)
    return sorted(path for path in paths if os.path.realpath(path.parent) != place)


def _folder(folder: Path, files: str | None, output: str | None) -> Source:
    """A folder of a data set, or of images, videos and PDFs."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise OptionError(f"{folder} is a data set with several splits: {splits}.", "Give the folder of one of them.")
    if (folder / "state.json").is_file():
        return _table(sorted(folder.glob("*.arrow")), folder, files)
    tables = _outside(folder.rglob("*.parquet"), output)
    if tables:
        _check_one_split(tables, folder)
        return _table(tables, folder, files)
    described = folder / "metadata.jsonl"
    if described.is_file():
        return _paths(str(described), [described], str(folder), files)
    found = Files(folder, None)
    if not found.count:
        lines = sorted(path.name for path in folder.iterdir() if path.suffix in LINES)
        hint = f"It has {lines[0]}: give that file." if lines else f"Give {_KINDS}."
        raise InputError(f"The folder {folder} has no images, videos or PDFs.", hint)
    if files is not None:
        raise OptionError(f"{option('files')} has no effect on a folder of files.", "Leave it out.")
    return Source("files", found.items, str(folder), found.total, {})


def _check_one_split(tables: Sequence[Path], folder: Path) -> None:
    """Raises an OptionError if a folder has the files of several splits, such as train and test."""
    splits = {path.name.split("-")[0].removesuffix(".parquet") for path in tables}
    known = sorted(splits & {"train", "test", "validation", "dev", "val"})
    if len(known) > 1:
        raise OptionError(
            f"{folder} is a data set with several splits: {', '.join(known)}.",
            f"Give one of them as a pattern: '{tables[0].parent}/{known[0]}*.parquet'.",
        )


def _paths(given: str, paths: list[Path], folder: str, files: str | None) -> Source:
    """A file, or the files that match a pattern, which must be of one kind."""
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes <= set(LINES):
        return _lines(paths, files or folder)
    if suffixes <= set(TABLES):
        return _table(paths, Path(folder), files)
    if suffixes & {*LINES, *TABLES}:
        raise OptionError(f"{given} has files of different kinds: {', '.join(sorted(suffixes))}.", "Give one kind.")
    usable = [path for path in paths if kind_of(path.name) is not None]
    if not usable:
        raise InputError(f"{given} is no input: its ending is {', '.join(sorted(suffixes))}.", f"Give {_KINDS}.")
    if files is not None:
        raise OptionError(f"{option('files')} has no effect on images, videos and PDFs.", "Leave it out.")
    found = Files(Path(folder), usable)
    return Source("files", found.items, folder, found.total, {})


def _table(paths: list[Path], folder: Path, files: str | None) -> Source:
    """Files of a table, of which the rows of all are read one after the other."""
    if not paths:
        raise InputError(f"The data set {folder} has no .arrow files.")
    made = Tables(paths)
    return Source("table", lambda: iter(made), files or str(folder), made.total, made.types)


def _lines(paths: list[Path], folder: str) -> Source:
    """Files of JSON lines; they are in OpenAI's batch format if the first line is."""
    first = next((item.columns for path in paths for item in _read_lines(path)), None)
    if first is None:
        raise InputError(f"{paths[0]} has no rows.", 'A line is {"image": "a.png", "prompt": "…"}, for example.')
    name = "openai" if {"custom_id", "url", "body"} <= first.keys() else "jsonl"
    total = sum(map(_count, paths))

    def items() -> Iterator[Item]:
        for path in paths:
            yield from _read_lines(path)

    return Source(name, items, folder, total, {})


def _count(path: Path) -> int:
    """The number of lines of a file that are not empty."""
    count = 0
    with path.open("rb") as file:
        while line := file.readline(1 << 20):
            blank = not line.strip()
            while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                blank = blank and not line.strip()
            count += not blank
    return count


def _read_lines(path: Path) -> Iterator[Item]:
    """Yields the rows of a file of JSON lines; a line that cannot be used becomes a row with an error."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path.name}, line {number}"
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                    yield Item({}, where, where, error=InputError(f"{where} has more than {MAX_LINE} bytes."))
                elif line.strip():
                    yield _item(line, where)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


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
