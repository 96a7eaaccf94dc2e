"""Tensors of a checkpoint that are stored as one or several tensors of a GGUF file, and read by rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.files import quote
from vlpack.checkpoint.gguf.header import Entry
from vlpack.checkpoint.gguf.types import BlockType
from vlpack.checkpoint.gguf.vision_names import KERNEL, KERNELS
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]
ReadRows = Callable[[TensorInfo, int, int], Array]
"""Reads a range of rows of a tensor, with its shape and dtype."""


@dataclass(frozen=True)
class Joined:
    """A tensor that is stored in several parts.

    Args:
        parts: the parts.
        frames: whether they are a kernel's frames ``[out, channels, height, width]``, which become the third axis of
            ``[out, channels, frames, height, width]``; otherwise their rows are stacked.
    """

    parts: tuple[TensorInfo, ...]
    frames: bool

    def rows(self, read: ReadRows, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        """Rows ``[start, stop)`` of the whole tensor."""
        if self.frames:
            return np.stack([read(part, start, stop).astype(dtype) for part in self.parts], axis=2)
        pieces, base = [], 0
        for part in self.parts:
            low, high = max(start - base, 0), min(stop - base, part.shape[0])
            if low < high:
                pieces.append(read(part, low, high))
            base += part.shape[0]
        return np.concatenate(pieces)


def stored(path: Path, entry: Entry, name: str) -> TensorInfo:
    """A tensor of a file under another name; one that is stored in blocks is a matrix of bytes.

    Raises:
        CheckpointError: it is stored in blocks and no matrix.
    """
    shape, kind = entry.shape, entry.kind
    if not isinstance(kind, BlockType):
        return TensorInfo(name, kind, shape, path, entry.offset, entry.nbytes)
    if len(shape) != 2:
        raise CheckpointError(
            f"{path}: the tensor {quote(entry.name)} is stored as {kind.name}, which only matrices can be; it has the "
            f"shape {list(shape)}."
        )
    octets = shape[1] // kind.values * kind.block.itemsize
    return TensorInfo(name, np.dtype(np.uint8), (shape[0], octets), path, entry.offset, entry.nbytes)


def join(path: Path, name: str, entries: Sequence[Entry]) -> tuple[TensorInfo, Joined | None]:
    """The tensor of a checkpoint that one or several tensors of a file make up.

    Args:
        path: path of the file.
        name: name of the tensor in the checkpoint.
        entries: its parts.

    Returns:
        The tensor, and its parts if there are several.

    Raises:
        CheckpointError: the parts do not fit each other.
    """
    kernel, first = name == KERNEL, entries[0]
    if len(entries) == 1 and not kernel:
        return stored(path, first, name), None
    if kernel and len(entries) < len(KERNELS):
        raise CheckpointError(
            f"{path} has {quote(first.name)} alone, but a patch has two frames, each with a tensor of its own: "
            f"{' and '.join(KERNELS)}."
        )
    if not kernel and (len(entries) != 3 or ".attn.qkv." not in name):
        raise CheckpointError(f"{path} has {quote(name)} twice, under different names.")
    parts = tuple(stored(path, entry, entry.name) for entry in entries)
    dtype = parts[0].dtype
    if kernel and len({part.dtype for part in parts}) > 1:
        dtype = np.dtype(np.float32)  # older converters store one frame in 16 bits and the other in 32
    same = len({part.shape for part in parts}) == 1 and (kernel or len({entry.kind for entry in entries}) == 1)
    if not same or (kernel and len(first.shape) != 4):
        raise CheckpointError(
            f"{path}: the tensors {', '.join(entry.name for entry in entries)} are the parts of one, but do not fit in "
            f"their types or in their shapes, {', '.join(str(list(entry.shape)) for entry in entries)}."
        )
    shape, values = parts[0].shape, len(parts) * int(np.prod(parts[0].shape, dtype=np.int64))
    whole = (*shape[:2], len(parts), *shape[2:]) if kernel else (len(parts) * shape[0], *shape[1:])
    return TensorInfo(name, dtype, whole, path, first.offset, values * dtype.itemsize), Joined(parts, kernel)
