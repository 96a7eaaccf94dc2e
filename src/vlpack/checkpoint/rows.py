"""Views of a checkpoint's tensors as the rows of one matrix: whole, sliced, transposed, stacked, interleaved
or shifted.

A `Rows` is plain data: a frozen dataclass, equal to another one with the same rows. It reads any range of rows without
the others, as far as the checkpoint's layout allows. A NaN or infinite value is an error that names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]


class Tensors(Protocol):
    """Named tensors that are read by rows: a `vlpack.checkpoint.checkpoint.Checkpoint`, or a view of one."""

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> Array:
        """Rows ``[start, stop)`` of a tensor; ``width`` is the number of columns if it is read as a matrix."""


class Rows(Protocol):
    """A matrix whose rows lie in one or more tensors of a checkpoint and are read by range."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def cols(self) -> int:
        """Number of values in each row."""

    def tensors(self) -> Iterator[Source]:
        """The tensors that hold the rows; a tensor that is used several times occurs several times."""

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        """Reads rows ``[start, stop)`` as an array ``[stop - start, cols]`` in the checkpoint's dtype.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint, with the shape that it must have, as a matrix.

    The first ``leading`` axes count rows and the others columns: one axis for a convolution's kernel
    ``[out, in, height, width]``, two for experts ``[experts, out, in]``.
    """

    name: str
    shape: tuple[int, ...]
    leading: int = 1

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[: self.leading]))

    @property
    def cols(self) -> int:
        return int(np.prod(self.shape[self.leading :]))

    def tensors(self) -> Iterator[Source]:
        yield self

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        piece = checkpoint.rows(self.name, start, stop, width=self.cols)
        check_finite(self.name, piece, start)
        return piece


@dataclass(frozen=True)
class Part:
    """A slice of another matrix: ``count`` rows, starting at row ``first``."""

    whole: Rows
    first: int
    count: int

    @property
    def rows(self) -> int:
        return self.count

    @property
    def cols(self) -> int:
        return self.whole.cols

    def tensors(self) -> Iterator[Source]:
        return self.whole.tensors()

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        return self.whole.read(checkpoint, self.first + start, self.first + stop)


@dataclass(frozen=True)
class TransposedRows:
    """The transpose of another matrix. Reading any row reads the whole matrix, which should therefore be small."""

    whole: Rows

    @property
    def rows(self) -> int:
        return self.whole.cols

    @property
    def cols(self) -> int:
        return self.whole.rows

    def tensors(self) -> Iterator[Source]:
        return self.whole.tensors()

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        return np.ascontiguousarray(self.whole.read(checkpoint, 0, self.whole.rows)[:, start:stop].T)


@dataclass(frozen=True)
class Stacked:
    """Several matrices of equal width, stacked vertically."""

    parts: tuple[Rows, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def cols(self) -> int:
        return self.parts[0].cols

    def tensors(self) -> Iterator[Source]:
        for part in self.parts:
            yield from part.tensors()

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        pieces, base = [], 0
        for part in self.parts:
            low, high = max(start - base, 0), min(stop - base, part.rows)
            if low < high:
                pieces.append(part.read(checkpoint, low, high))
            base += part.rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stacked(parts: Iterable[Rows]) -> Rows:
    """Stacks matrices vertically; a single matrix is returned unchanged."""
    parts = tuple(parts)
    return parts[0] if len(parts) == 1 else Stacked(parts)


@dataclass(frozen=True)
class Shifted:
    """Another matrix with a number added to every value, in fp32: a norm's weights stored as differences from 1."""

    whole: Rows
    offset: float

    @property
    def rows(self) -> int:
        return self.whole.rows

    @property
    def cols(self) -> int:
        return self.whole.cols

    def tensors(self) -> Iterator[Source]:
        return self.whole.tensors()

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        shifted: Array = self.whole.read(checkpoint, start, stop).astype(np.float32) + np.float32(self.offset)
        return shifted


@dataclass(frozen=True)
class Alternating:
    """Two matrices with their rows interleaved, as onnxruntime's expert operator expects gate and up projections."""

    first: Rows
    second: Rows

    @property
    def rows(self) -> int:
        return 2 * self.first.rows

    @property
    def cols(self) -> int:
        return self.first.cols

    def tensors(self) -> Iterator[Source]:
        yield from self.first.tensors()
        yield from self.second.tensors()

    def read(self, checkpoint: Tensors, start: int, stop: int) -> Array:
        low, high = start // 2, -(-stop // 2)
        pair = [part.read(checkpoint, low, high) for part in (self.first, self.second)]
        both = np.stack(pair, axis=1).reshape(2 * (high - low), pair[0].shape[1])
        return both[start - 2 * low : stop - 2 * low]


def check_finite(name: str, piece: Array, first_row: int) -> None:
    """Checks that rows of a tensor hold only values that are finite in fp32.

    Args:
        name: name of the tensor.
        piece: the rows, ``[rows, cols]``.
        first_row: index of the first of these rows in the tensor.

    Raises:
        CheckpointError: a value is NaN or infinite, or becomes infinite in fp32.
    """
    if piece.size and not _all_finite(piece):
        with np.errstate(over="ignore"):
            row, column = np.argwhere(~np.isfinite(piece.astype(np.float32)))[0]
        raise CheckpointError(
            f"The tensor {name} holds {float(piece[row, column])} at row {first_row + row}, column {column}.",
            "The checkpoint is damaged; download or save it again.",
        )


def _all_finite(piece: Array) -> bool:
    if piece.dtype == ml_dtypes.bfloat16:
        # read as integers, infinities and NaN are the largest values of each sign
        return bool(piece.view(np.int16).max() < 0x7F80 and piece.view(np.uint16).max() < 0xFF80)
    with np.errstate(over="ignore"):
        wide = piece.astype(np.float32, copy=False)  # all weights are converted to float32 before they are stored
    # a sum of finite float32 values could overflow; max and min cannot, and both pass NaN on
    return bool(np.isfinite(wide.max()) and np.isfinite(wide.min()))
