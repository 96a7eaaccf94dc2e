"""Weights that are stored transposed, with codes packed into 32-bit words: the layouts of GPTQ and AWQ.

The rows of such a weight are columns of the stored tensors. Each thread keeps the unpacked codes of the rows that it
read last (a window), so a weight that is read slab by slab is unpacked only once.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.formats.packed import Grid, Gridded, is_half

Array = npt.NDArray[Any]

WINDOW = 1 << 25
"""Largest number of codes that a thread keeps, one byte each."""
_SLAB = 1 << 22
"""Number of packed words that are read and unpacked at a time."""


class _Window(NamedTuple):
    """The unpacked codes of some adjacent rows of a weight.

    Attributes:
        owner: the weight.
        start: first row.
        codes: codes, uint8 ``[n, K]``.
    """

    owner: Any
    start: int
    codes: Array


class _Last(threading.local):
    """Thread-local storage for the window that a thread read last."""

    window: _Window | None = None


_last = _Last()


class ColumnPacked(Gridded):
    """A weight that is stored transposed: packed codes ``[K, N]``, packed zero points and scales ``[G, N]``.

    Attributes:
        qweight: name of the packed codes.
        qzeros: name of the packed zero points.
        scale: name of the scales.
        per_word: number of codes in a word.
    """

    qweight: str
    qzeros: str
    scale: str

    @property
    def per_word(self) -> int:
        """Number of codes in a word of 32 bits."""
        return 32 // self.bits

    @property
    def grid(self) -> Grid | None:
        if self.obstacle:
            return None
        middle = 1 << (self.bits - 1)
        symmetric = bool((self.zero_table(0, self.count) == middle).all())
        return Grid(self.bits, self.group, symmetric, is_half(self.base, self.scale))

    def codes(self, start: int, stop: int) -> Array:
        step = max(self.per_word, WINDOW // self.cols // self.per_word * self.per_word)
        pieces = []
        for first in range(start // step * step, stop, step):
            window = _last.window
            if window is None or window.owner is not self or window.start != first:
                _last.window = None  # released before the next one is allocated
                window = _Window(self, first, self._window(first, min(first + step, self.count)))
                _last.window = window
            pieces.append(window.codes[max(start - first, 0) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def scales(self, start: int, stop: int) -> Array:
        table = self.base.read(self.scale)[:, start:stop]
        return np.ascontiguousarray(table.T, np.float32)

    def zeros(self, start: int, stop: int) -> Array:
        return np.ascontiguousarray(self.zero_table(start, stop).T)

    @abstractmethod
    def zero_table(self, start: int, stop: int) -> Array:
        """The zero points of rows ``[start, stop)`` of the weight, uint8 ``[G, stop - start]``."""

    @abstractmethod
    def unpack(self, words: Array, start: int, stop: int) -> Array:
        """Unpacks the codes of rows ``[start, stop)`` from some adjacent rows of the packed tensor.

        Args:
            words: rows of the packed tensor, int32; they hold k columns of the weight.
            start: first row of the weight.
            stop: row of the weight after the last one.

        Returns:
            The codes, uint8 ``[stop - start, k]``.
        """

    def _window(self, start: int, stop: int) -> Array:
        """The codes of rows ``[start, stop)`` in all columns, uint8 ``[stop - start, K]``."""
        codes = np.empty((stop - start, self.cols), np.uint8)
        rows, width = self.base.tensors[self.qweight].shape
        per_row = self.cols // rows  # columns of the weight in each packed row: 1, or as many as a word has codes
        step = max(1, _SLAB // max(1, width))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            piece = self.unpack(self.base.rows(self.qweight, first, last), start, stop)
            codes[:, first * per_row : last * per_row] = piece
        return codes
