"""Reads the header of an untrusted safetensors file and checks all of it.

The whole format:

    8 bytes   n, the header's length, unsigned little-endian
    n bytes   a JSON object in UTF-8 that begins with `{` and may be padded with spaces at its end:
                  "model.norm.weight": {"dtype": "BF16", "shape": [2560], "data_offsets": [0, 5120]}, …
              and optionally "__metadata__", an object of strings
    the rest  the tensors' elements, little-endian, row-major; offsets count from here, and every byte from here to
              the end of the file belongs to exactly one tensor
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlpack.checkpoint.files import DOWNLOAD_AGAIN, OpenFile, check_not_lfs_pointer, parse_json, quote
from vlpack.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Largest header that is read, in bytes; the safetensors library has the same limit."""
MAX_TENSORS = 1_000_000
"""Largest number of tensors in a checkpoint; the largest known checkpoints have about 100 000."""
MAX_NAME_LENGTH = 1024
"""Longest name of a tensor, in characters."""
MAX_RANK = 32
"""Largest number of dimensions of a tensor, the limit of NumPy before 2.0."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
} | {
    name: np.dtype(getattr(ml_dtypes, scalar))
    for name, scalar in {
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }.items()
    if hasattr(ml_dtypes, scalar)  # E8M0 came with ml_dtypes 0.5
}
"""Element types by their names in the format. F4 and F6, which pack several elements in a byte, are not read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, type, shape and place of a tensor; `offset` counts bytes from the beginning of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: OpenFile) -> list[TensorInfo]:
    """Reads and checks a safetensors header and returns the tensors in the order of their bytes.

    Raises:
        CheckpointError: the header is damaged, or does not describe exactly the file's bytes.
    """
    path = file.shown
    if file.size < 8:
        raise CheckpointError(f"{path} is not a safetensors file: it has only {file.size} bytes.", DOWNLOAD_AGAIN)
    (length,) = struct.unpack("<Q", start := file.read(0, 8))
    if start == b"version ":
        check_not_lfs_pointer(path, file.read(0, min(file.size, 64)))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would be {length} bytes long, "
            f"more than the format's {MAX_HEADER_BYTES}.",
            DOWNLOAD_AGAIN,
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path} is truncated: its header ends at byte {8 + length}, but the file has {file.size} bytes.",
            DOWNLOAD_AGAIN,
        )
    header = file.read(8, length)
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object.", DOWNLOAD_AGAIN)
    _check_counts(header, path)
    entries = parse_json(header, f"{path}: the header", strict=True)
    del header
    _check_metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: the header describes more than {MAX_TENSORS} tensors.")
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, path, 8 + length, file.size)
    return tensors


def _check_counts(header: bytes, path: Path) -> None:
    """Counts characters to refuse JSON that cannot be a header, because parsing could take thirty times its size."""
    objects = header.count(b"{")
    if objects > MAX_TENSORS + 2:  # the header itself and the metadata
        raise CheckpointError(f"{path}: the header describes more than {MAX_TENSORS} tensors.")
    # An entry has 5 strings, 2 lists and at most 35 commas; the metadata may add some more.
    for mark, most in ((b'"', 10), (b"[", 2), (b",", MAX_RANK + 3)):
        if header.count(mark) > most * objects + 1_000_000:
            raise CheckpointError(f"{path}: the header holds more than descriptions of tensors.", DOWNLOAD_AGAIN)


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}, tensor {quote(name)}"
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise CheckpointError(f"{where}: the name is empty, too long or holds characters that cannot be printed.")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: the entry must be an object with dtype, shape and data_offsets.")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]

    dtype = DTYPES.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: elements of type {quote(tag)} are not supported, only {', '.join(DTYPES)}.",
            "Use the model's original checkpoint in bfloat16, float16 or float32.",
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(size) for size in shape):
        raise CheckpointError(f"{where}: the shape must be a list of at most {MAX_RANK} non-negative integers.")
    nbytes, span = dtype.itemsize, dtype.itemsize
    for size in shape:
        nbytes *= size
        span *= max(size, 1)  # NumPy's size limit ignores zeros: [0, 2**62, 4] is too large for it
    if span >= 1 << 63:
        raise CheckpointError(f"{where}: the shape {quote(shape)} is larger than any machine's memory.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two non-negative integers.")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: the data would end, at {quote(end)}, before it begins, at {quote(begin)}.")
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {tag} of shape {quote(shape)} is {nbytes} bytes, but data_offsets span {quote(end - begin)}."
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # not isinstance, because True is an int too


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header must be an object of strings.")


def _check_cover(tensors: list[TensorInfo], path: Path, data_start: int, file_size: int) -> None:
    """Checks that each byte belongs to exactly one tensor: none overlap, and no data lies between or after them."""
    end, first_lost = data_start, None
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}, tensor {quote(tensor.name)} {what}: it begins at byte {tensor.offset} and not at {end}."
            )
        end += tensor.nbytes
        if end > file_size and first_lost is None:
            first_lost = tensor.name
    if first_lost is not None:
        raise CheckpointError(
            f"{path} is truncated: it should have {end} bytes and has {file_size}; "
            f"the first tensor without its data is {quote(first_lost)}.",
            DOWNLOAD_AGAIN,
        )
    if end < file_size:
        raise CheckpointError(
            f"{path} has {file_size - end} bytes after its last tensor: it should have {end} bytes "
            f"and has {file_size}.",
            DOWNLOAD_AGAIN,
        )
