"""Where a weight's rows lie in a checkpoint: a tensor, or several above each other, in turn, or turned.

A `Rows` is data (a frozen dataclass, equal where the rows are) and reads any range of its rows without the others, as
far as the checkpoint's layout lets it. Numbers that are NaN or infinite are found here, with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlpack.errors import CheckpointError

if TYPE_CHECKING:
    from vlpack.checkpoint.checkpoint import Checkpoint

Array = npt.NDArray[Any]


class Rows(Protocol):
    """The rows of a matrix; see the module's docstring."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def cols(self) -> int:
        """The length of each."""

    def tensors(self) -> Iterator[Source]:
        """The tensors in which they lie, one of them several times where it serves several."""

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        """Rows ``[start, stop)`` as ``[stop - start, cols]``, in the checkpoint's dtype.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint and the shape it must have.

    Seen as a matrix, ``leading`` of its axes count rows: one for a kernel ``[out, in, height, width]``, two for experts
    ``[experts, out, in]``.
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

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        piece = checkpoint.rows(self.name, start, stop, width=self.cols)
        check_finite(self.name, piece, start)
        return piece


@dataclass(frozen=True)
class Part:
    """``count`` rows of others, from ``first`` on."""

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

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        return self.whole.read(checkpoint, self.first + start, self.first + stop)


@dataclass(frozen=True)
class Turned:
    """The columns of others as rows. All of them are read for any of these, so they should be few."""

    whole: Rows

    @property
    def rows(self) -> int:
        return self.whole.cols

    @property
    def cols(self) -> int:
        return self.whole.rows

    def tensors(self) -> Iterator[Source]:
        return self.whole.tensors()

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        return np.ascontiguousarray(self.whole.read(checkpoint, 0, self.whole.rows)[:, start:stop].T)


@dataclass(frozen=True)
class Stacked:
    """Rows above each other."""

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

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        pieces, base = [], 0
        for part in self.parts:
            low, high = max(start - base, 0), min(stop - base, part.rows)
            if low < high:
                pieces.append(part.read(checkpoint, low, high))
            base += part.rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stacked(parts: Iterable[Rows]) -> Rows:
    """Rows above each other; what is alone is itself."""
    parts = tuple(parts)
    return parts[0] if len(parts) == 1 else Stacked(parts)


@dataclass(frozen=True)
class Alternating:
    """A row of the first, a row of the second, and so on: gate and up as ORT's experts want them."""

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

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        low, high = start // 2, -(-stop // 2)
        pair = [part.read(checkpoint, low, high) for part in (self.first, self.second)]
        both = np.stack(pair, axis=1).reshape(2 * (high - low), self.cols)
        return both[start - 2 * low : stop - 2 * low]


def check_finite(name: str, piece: Array, first_row: int) -> None:
    """Every value of ``piece``, rows of the tensor ``name`` from ``first_row`` on, is a number that fp32 holds.

    Raises:
        CheckpointError: one is NaN or infinite.
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
        # as whole numbers, infinities and NaN are the largest of each sign
        return bool(piece.view(np.int16).max() < 0x7F80 and piece.view(np.uint16).max() < 0xFF80)
    with np.errstate(over="ignore"):
        wide = piece.astype(np.float32, copy=False)  # what is stored is made of these, float64 too
    # the sum of finite float32 values may overflow, a max or min may not; NaN passes through both
    return bool(np.isfinite(wide.max()) and np.isfinite(wide.min()))
