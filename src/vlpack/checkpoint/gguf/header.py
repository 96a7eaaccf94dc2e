"""A reader of the header of an untrusted GGUF file, its metadata and table of tensors, which checks all of it.

The format of a file, whose numbers are little-endian:

    4 bytes   the letters GGUF
    uint32    version, 2 or 3
    uint64    number of tensors
    uint64    number of metadata entries
    entries   each a key (string), the number of a type (uint32) and a value; an array is the number of its elements'
              type (uint32), their count (uint64) and the elements; a string is its length (uint64) and its UTF-8 bytes
    tensors   each a name (string), the number of dimensions (uint32), the dimensions (uint64), the last axis first, the
              number of a type (uint32) and an offset (uint64)
    padding   to a multiple of ``general.alignment``, by default 32
    the rest  the tensors' bytes; offsets count from here and are multiples of the alignment

Source: the format's specification, ``docs/gguf.md`` of ggml, and the package ``gguf`` 0.19.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlpack.checkpoint.files import DOWNLOAD_AGAIN, OpenFile, check_not_lfs_pointer, quote, quote_error
from vlpack.checkpoint.gguf.types import BLOCKS, FLOATS, READ, REFUSED, BlockType
from vlpack.errors import CheckpointError

MAGIC = b"GGUF"
"""First four bytes of a GGUF file."""
MAX_HEADER_BYTES = 200_000_000
"""Largest header that is read, in bytes; vocabularies of 260 000 tokens take 12 MB."""
MAX_ENTRIES = 65_536
"""Largest number of metadata entries."""
MAX_ELEMENTS = 8_000_000
"""Largest number of elements of all arrays together; a vocabulary of 260 000 tokens takes about a million."""
MAX_TENSORS = 1_000_000
"""Largest number of tensors."""
MAX_KEY, MAX_NAME, MAX_STRING = 1024, 256, 1 << 24
"""Longest key, tensor name and other string, in bytes."""
MAX_RANK = 4
"""Largest number of dimensions of a tensor."""
WINDOW = 1 << 20
"""Number of bytes of the header that are read at a time."""

_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Numpy dtypes of metadata values, by their types in the format; 7 is a truth value."""
_BOOL, _FLOAT, _STRING, _ARRAY = 7, 6, 8, 9
"""Types of metadata values that are treated specially."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file.

    Args:
        name: its name in the file, such as ``blk.0.attn_q.weight``.
        shape: its shape; values along the last axis are adjacent in memory.
        kind: its type: the dtype of its values, or the description of its blocks.
        offset: offset of its bytes from the beginning of the file.
        nbytes: number of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: np.dtype[Any] | BlockType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Args:
        metadata: values of the metadata, by key.
        tensors: the tensors, in the order of their bytes.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[Entry, ...]


class _Cursor:
    """A sequential reader of the header of a file.

    Attributes:
        file: the file.
        place: offset of the next byte.
        elements: number of elements of all arrays so far.
    """

    def __init__(self, file: OpenFile) -> None:
        self.file, self.place = file, 0
        self.elements = 0
        self._start, self._window = 0, b""

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; ``what`` names them in the error if the file ends before."""
        end = self.place + count
        if end > min(self.file.size, MAX_HEADER_BYTES):
            why = f"is longer than {MAX_HEADER_BYTES} bytes" if end <= self.file.size else "is truncated"
            raise CheckpointError(
                f"{self.file.shown}: the header {why}: {what} would end at byte {end}, and the file has "
                f"{self.file.size} bytes.",
                DOWNLOAD_AGAIN,
            )
        if end > self._start + len(self._window):
            self._window = self.file.read(self.place, min(max(count, WINDOW), self.file.size - self.place))
            self._start = self.place
        piece = self._window[self.place - self._start : end - self._start]
        self.place = end
        return piece

    def number(self, form: str, what: str) -> int:
        """The next number, in a format of `struct`; ``what`` names it in errors."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, limit: int, what: str) -> str:
        """The next string, of at most ``limit`` bytes; ``what`` names it in errors."""
        length = self.number("<Q", what)
        if length > limit:
            raise self.wrong(f"{what} would have {length} bytes, and no more than {limit} are read")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8: {quote_error(error)}") from None

    def wrong(self, what: str) -> CheckpointError:
        """The error for a damaged header."""
        return CheckpointError(f"{self.file.shown}: {what}.", DOWNLOAD_AGAIN)


def read_header(file: OpenFile) -> Header:
    """Reads and checks the header of a GGUF file.

    Raises:
        CheckpointError: the file is not GGUF, its header is damaged or of a version or type that is not read, or a
            tensor lies outside of the file or over another one.
    """
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4, "the format's name") != MAGIC:
        check_not_lfs_pointer(file.shown, file.read(0, min(file.size, 64)))
        raise cursor.wrong("it is not a GGUF file, because it does not begin with the letters GGUF")
    version = cursor.number("<I", "the version")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{file.shown} is a big-endian GGUF file; only little-endian ones are read.")
    if version not in (2, 3):
        raise CheckpointError(f"{file.shown} is of version {version} of GGUF; versions 2 and 3 are read.")
    tensors, entries = (cursor.number("<Q", f"the number of {what}") for what in ("tensors", "metadata entries"))
    for count, limit, what in ((tensors, MAX_TENSORS, "tensors"), (entries, MAX_ENTRIES, "metadata entries")):
        if count > limit:
            raise cursor.wrong(f"the header names {count} {what}, and no more than {limit} are read")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text(MAX_KEY, "a metadata key")
        if key in metadata:
            raise cursor.wrong(f"the metadata key {quote(key)} appears twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"the type of {quote(key)}"), quote(key))
    raw = [_raw_entry(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment is {quote(alignment)}; it must be a power of two")
    start = -(-cursor.place // alignment) * alignment
    found = [_entry(cursor, alignment, start, *one) for one in raw]
    found.sort(key=lambda entry: entry.offset)
    _check_places(cursor, found)
    return Header(metadata, tuple(found))


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    """Reads a metadata value of the type ``kind``; ``what`` names it in errors."""
    if kind == _STRING:
        return cursor.text(MAX_STRING, what)
    if kind in _NUMBERS:
        return _numbers(cursor, kind, 1, what)[0]
    if kind != _ARRAY:
        raise cursor.wrong(f"{what} is of the type {kind}, which the format does not have")
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise cursor.wrong(
            f"{what} would have {count} elements, and no more than {MAX_ELEMENTS} are read in all arrays"
        )
    if kind == _STRING:
        return [cursor.text(MAX_STRING, what) for _ in range(count)]
    if kind not in _NUMBERS:
        raise cursor.wrong(f"{what} is an array of elements of the type {kind}, which are not read")
    return _numbers(cursor, kind, count, what)


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> list[Any]:
    """Reads ``count`` numbers of the type ``kind``; ``what`` names them in errors."""
    dtype = np.dtype(_NUMBERS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)
    if kind == _BOOL:
        return [bool(value) for value in values]
    # the shortest decimal with the same float32 value, such as 1e-6, is the setting that was rounded to float32
    return [float(str(value)) for value in values] if kind == _FLOAT else values.tolist()


def _raw_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads an entry of the table of tensors: name, shape, number of the type, and offset."""
    name = cursor.text(MAX_NAME, "a tensor's name")
    where = f"the entry of the tensor {quote(name)}"
    if not name or not name.isprintable():
        raise cursor.wrong(f"the tensor name {quote(name)} is empty or holds characters that cannot be printed")
    rank = cursor.number("<I", where)
    if not 1 <= rank <= MAX_RANK:
        raise cursor.wrong(f"the tensor {quote(name)} has {rank} dimensions; it must have 1 to {MAX_RANK}")
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, where))[::-1]
    return name, shape, cursor.number("<I", where), cursor.number("<Q", where)


def _entry(
    cursor: _Cursor, alignment: int, start: int, name: str, shape: tuple[int, ...], number: int, offset: int
) -> Entry:
    """Checks an entry of the table of tensors.

    Args:
        cursor: reader of the header, for errors.
        alignment: number of which offsets are multiples, in bytes.
        start: offset of the tensors' bytes from the beginning of the file.
        name: name of the tensor.
        shape: its shape.
        number: number of its type.
        offset: offset of its bytes from ``start``.

    Raises:
        CheckpointError: the type is unknown or not read, or shape or offset are invalid.
    """
    where = f"the tensor {quote(name)}"
    kind: np.dtype[Any] | BlockType | None = FLOATS[number] if number in FLOATS else BLOCKS.get(number)
    if kind is None:
        known = REFUSED.get(number)
        if known is None:
            raise cursor.wrong(f"{where} is of the type {number}, which the format does not have")
        raise CheckpointError(
            f"{cursor.file.shown}: {where} is of the type {known}, which vlpack does not read.",
            f"Take a file of another quantization of this model, such as Q4_0 or Q8_0; {READ} are read.",
        )
    if 0 in shape or math.prod(shape) >= 1 << 56:
        raise cursor.wrong(f"{where} has the shape {list(shape)}, which is empty or larger than any memory")
    if isinstance(kind, BlockType):
        if shape[-1] % kind.values:
            raise cursor.wrong(f"{where} has rows of {shape[-1]} values, which blocks of {kind.values} do not divide")
        nbytes = math.prod(shape) // kind.values * kind.block.itemsize
    else:
        nbytes = math.prod(shape) * kind.itemsize
    if offset % alignment:
        raise cursor.wrong(f"{where} begins at byte {offset}, which is not a multiple of {alignment}")
    return Entry(name, shape, kind, start + offset, nbytes)


def _check_places(cursor: _Cursor, found: list[Entry]) -> None:
    """Checks that tensors lie within the file, do not overlap, and have different names."""
    end, names = 0, set()
    for entry in found:
        where = f"the tensor {quote(entry.name)}"
        if entry.name in names:
            raise cursor.wrong(f"{where} appears twice")
        if entry.offset < end:
            raise cursor.wrong(f"{where} overlaps the tensor before it: it begins at byte {entry.offset}, not at {end}")
        names.add(entry.name)
        end = entry.offset + entry.nbytes
        if end > cursor.file.size:
            raise cursor.wrong(
                f"it is truncated: {where} would end at byte {end}, and the file has {cursor.file.size} bytes"
            )
