"""Inputs of a batch: finding the input that a user names, and reading its rows one by one while others are answered."""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vlpack.bulk.files import Files, files_in, kind_of
from vlpack.bulk.lines import Lines
from vlpack.bulk.row import Item, Portion
from vlpack.bulk.storage import Local, Remote, is_uri
from vlpack.bulk.tables import Table
from vlpack.errors import InputError, OptionError, option

AT_ONCE = 16
"""Number of files that are opened at a time to find out their columns and numbers of rows."""

FILES = 256
"""Number of files in a portion of an input of images, videos and PDFs."""

LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
"""Endings of the names of files with JSON lines, and of files with tables."""

_KINDS = "a folder or pattern of images, videos and PDFs, a file .jsonl or .parquet, or a folder of a data set"
"""The kinds of inputs, for messages."""


class Source(NamedTuple):
    """An input that was found.

    Attributes:
        name: name of its kind: ``files``, ``jsonl``, ``openai`` or ``table``.
        portions: function that iterates over its portions, such as files, in order.
        folder: path or URI of the folder in which the files that rows name must be.
        total: number of rows; None if it is not known until all are read.
        types: pyarrow types of the columns; empty if they are not known.
    """

    name: str
    portions: Callable[[], Iterator[Portion]]
    folder: str
    total: int | None
    types: dict[str, Any]

    def items(self) -> Iterator[Item]:
        """Iterates over the rows, from the beginning."""
        return (item for portion in self.portions() for _, item in portion.read())


def open_source(given: str, files: str | None = None, output: str | None = None) -> Source:
    """Finds an input.

    Args:
        given: a folder, a pattern, a file, or the URI of a folder or file.
        files: folder or URI in which the files that rows name must be; None for the folder of the input.
        output: folder of the output, whose files are no input, even if it lies in the folder of the input.

    Raises:
        InputError: there is no such input, or it has no rows.
        OptionError: it has files of different kinds, or a library that it needs is not installed.
    """
    if files is not None and not (is_uri(files) or os.path.isdir(os.path.expanduser(files))):
        raise OptionError(f"{option('files')} is {files}, which is not a folder.")
    if is_uri(given):
        return _at_uri(given, files, output)
    place = os.path.expanduser(given)
    if os.path.isdir(place):
        return _folder(Local(Path(place)), files, output)
    if os.path.isfile(place):
        return _paths(given, Local(Path(place).parent), [Path(place).name], files)
    if glob.has_magic(place):
        matches = (Path(path) for path in glob.iglob(place, recursive=True) if os.path.isfile(path))
        found = _outside(matches, output)
        if not found:
            raise InputError(f"No file matches the pattern {given}.", "A pattern may contain *, ?, [a-z] and **.")
        fixed = _fixed(place)
        names = [Path(os.path.relpath(path, fixed)).as_posix() for path in found]
        return _paths(given, Local(Path(fixed)), names, files)
    raise InputError(f"There is no file or folder {given}.", f"Give {_KINDS}.")


def _path(place: Local | Remote) -> str:
    """The path or URI of a folder."""
    return place.uri if isinstance(place, Remote) else str(place.folder)


def _at_uri(given: str, files: str | None, output: str | None) -> Source:
    """A file or folder at a URI."""
    if given.startswith(("http://", "https://")):
        raise InputError(f"{given} is a URL, which is not read.", f"Give {_KINDS}.")
    place = Remote(given)
    if place.is_file():
        folder, name = place.split()
        return _paths(given, folder, [name], files)
    if place.is_folder():
        return _folder(place, files, output)
    raise InputError(f"There is no file or folder {given}.", "A URI may not be a pattern: give a file or a folder.")


def _fixed(pattern: str) -> str:
    """The folder before the first special character of a pattern."""
    parts = Path(pattern).parts
    end = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:end])) if end else "."


def _outside(paths: Iterable[Path], output: str | None) -> list[Path]:
    """The sorted paths of files that are not directly in the folder of the output."""
    place = None if output is None else os.path.realpath(output)
    return sorted(path for path in paths if os.path.realpath(path.parent) != place)


def _folder(place: Local | Remote, files: str | None, output: str | None) -> Source:
    """A folder of a data set, or of images, videos and PDFs."""
    folder = place.name
    top: set[str] = set()  # files of the folder itself by which it is recognized
    splits: set[str] = set()
    tables, media, pdfs = [], 0, False
    for name in place.names():
        parent, _, last = name.rpartition("/")
        if not parent and last.endswith((".json", ".arrow", *LINES)):
            top.add(last)
        elif last == "state.json" and "/" not in parent:
            splits.add(parent)
        if last.endswith(".parquet"):
            tables.append(name)
    if "dataset_dict.json" in top:
        raise OptionError(
            f"{folder} is a data set with several splits: {', '.join(sorted(splits))}.",
            "Give the folder of one of them.",
        )
    if "state.json" in top:
        arrows = sorted(name for name in top if name.endswith(".arrow"))
        if not arrows:
            raise InputError(f"The data set {folder} has no .arrow files.")
        return _table(place, arrows, files)
    tables = _input_tables(place, tables, output)
    if tables:
        _check_one_split(tables, folder)
        return _table(place, tables, files)
    if "metadata.jsonl" in top:
        return _paths(f"{folder}/metadata.jsonl", place, ["metadata.jsonl"], files)
    for name in files_in(place):
        media += 1
        pdfs = pdfs or kind_of(name.rpartition("/")[2]) == "pdf"
    if not media:
        lines = sorted(name for name in top if name.endswith(LINES))
        hint = f"It has {lines[0]}: give that file." if lines else f"Give {_KINDS}."
        raise InputError(f"The folder {folder} has no images, videos or PDFs.", hint)
    if files is not None:
        raise OptionError(f"{option('files')} has no effect on a folder of files.", "Leave it out.")
    return _files(_path(place), lambda: files_in(place), None if pdfs else media)


def _input_tables(place: Local | Remote, names: list[str], output: str | None) -> list[str]:
    """The Parquet files of a folder, sorted, without those of the output."""
    if isinstance(place, Local):
        root = place.folder
        return [path.relative_to(root).as_posix() for path in _outside((root / name for name in names), output)]
    there = None if output is None or not is_uri(output) else Remote(output)
    return sorted(name for name in names if there is None or not there.has(place, name))


def _files(folder: str, names: Callable[[], Iterable[str]], total: int | None) -> Source:
    """Images, videos and PDFs as an input."""

    def portions() -> Iterator[Portion]:
        rest = iter(names())
        while some := list(itertools.islice(rest, FILES)):
            yield Files(folder, some)

    return Source("files", portions, folder, total, {})


def _check_one_split(tables: Sequence[str], folder: str) -> None:
    """Raises an OptionError if a folder has the files of several splits, such as train and test."""
    splits = {name.rpartition("/")[2].split("-")[0].removesuffix(".parquet") for name in tables}
    known = sorted(splits & {"train", "test", "validation", "dev", "val"})
    if len(known) > 1:
        parent = f"{folder}/{tables[0]}".rpartition("/")[0]
        raise OptionError(
            f"{folder} is a data set with several splits: {', '.join(known)}.",
            f"Give one of them as a pattern: '{parent}/{known[0]}*.parquet'.",
        )


def _paths(given: str, place: Local | Remote, names: list[str], files: str | None) -> Source:
    """A file, or the files that match a pattern, which must be of one kind."""
    suffixes = {posixpath.splitext(name)[1].lower() for name in names}
    if suffixes <= set(LINES):
        return _lines(place, names, files)
    if suffixes <= set(TABLES):
        return _table(place, names, files)
    if suffixes & {*LINES, *TABLES}:
        raise OptionError(f"{given} has files of different kinds: {', '.join(sorted(suffixes))}.", "Give one kind.")
    usable = [name for name in names if kind_of(name.rpartition("/")[2]) is not None]
    if not usable:
        raise InputError(f"{given} is no input: its ending is {', '.join(sorted(suffixes))}.", f"Give {_KINDS}.")
    if files is not None:
        raise OptionError(f"{option('files')} has no effect on images, videos and PDFs.", "Leave it out.")
    pdfs = any(kind_of(name.rpartition("/")[2]) == "pdf" for name in usable)
    return _files(_path(place), lambda: usable, None if pdfs else len(usable))


def _table(place: Local | Remote, names: list[str], files: str | None) -> Source:
    """Files of a table, of which the rows of all are read one after the other."""
    made = [Table(place, name) for name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        heads = list(pool.map(Table.head, made))
    counts = [count for _, count in heads if count is not None]
    total = sum(counts) if len(counts) == len(made) else None
    return Source("table", lambda: iter(made), files or _path(place), total, heads[0][0])


def _lines(place: Local | Remote, names: list[str], files: str | None) -> Source:
    """Files of JSON lines; they are in OpenAI's batch format if the first line is."""
    made = [Lines(place, name) for name in names]
    first = next((item.columns for one in made for _, item in one.read()), None)
    if first is None:
        raise InputError(
            f"{place.name}/{names[0]} has no rows.", 'A line is {"image": "a.png", "prompt": "…"}, for example.'
        )
    name = "openai" if {"custom_id", "url", "body"} <= first.keys() else "jsonl"
    total = sum(one.count() for one in made) if isinstance(place, Local) else None
    return Source(name, lambda: iter(made), files or _path(place), total, {})
