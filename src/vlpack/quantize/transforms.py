"""Transforms of weights before they are stored: balance and rotation of channels, which do not change the model.

A `Channels` is a set of channels between the weight that computes them (that of a norm, or rows of a matrix) and the
matrices that read them. A `Transform` describes how balance and rotation change one weight. Both are plain data. A
`ChannelScales` computes the scales that balance each set of channels, once for all weights that need them.
"""

from __future__ import annotations

import base64
import math
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.rows import Rows
from vlpack.quantize.rotate import LARGEST, equal_columns, even_sizes, rotate, rotation_matrix
from vlpack.quantize.storage import slabs

if TYPE_CHECKING:
    from vlpack.checkpoint.checkpoint import Checkpoint

Array = npt.NDArray[Any]

MAX_CHANNELS = 1 << 24
"""Largest number of channels in one set that is read from a manifest."""


@dataclass(frozen=True)
class Channels:
    """A set of channels that one weight computes and other weights read.

    Args:
        producer: weight of the norm, ``[channels, 1]``, or the matrix whose rows compute the channels.
        first: index of the producer's row that computes the first channel.
        readers: matrices that multiply the channels.
        shape: ``(a, g, b)``, the shape of a reader's ``a · g · b`` columns, which belong to ``a · b`` channels. Each
            channel is repeated ``g`` times, for query heads that share a value head or for patches that are merged.
        tolerance: tolerance of `vlpack.quantize.rotate.even_sizes`; None for `vlpack.quantize.rotate.equal_columns`.
    """

    producer: Rows
    first: int
    readers: tuple[Rows, ...]
    shape: tuple[int, int, int]
    tolerance: float | None = None

    @property
    def name(self) -> str:
        """Name of the set, unique in a model: the tensor that computes the first channel, a colon and `first`."""
        return f"{next(self.producer.tensors()).name}:{self.first}"

    @property
    def count(self) -> int:
        """Number of channels."""
        return self.shape[0] * self.shape[2]

    def along_columns(self, scales: Array) -> Array:
        """Scales ``[channels]`` repeated and arranged as the readers' columns are."""
        a, g, b = self.shape
        return np.broadcast_to(scales.reshape(a, 1, b), (a, g, b)).reshape(-1)

    def reader_norms(self, checkpoint: Checkpoint) -> Array:
        """L2 norms ``[channels]`` of the columns of all readers together."""
        total = np.zeros(self.shape, np.float64)
        for reader in self.readers:
            for start, stop in slabs(reader.rows, reader.cols):
                piece = reader.read(checkpoint, start, stop).astype(np.float32, copy=False)
                # summed row by row, so that the order does not depend on the processor; sums of tiles are added in
                # float64
                for tile in range(0, len(piece), 64):
                    squares = np.square(piece[tile : tile + 64])
                    total += np.add.reduce(squares, axis=0).reshape(self.shape)
        return np.asarray(np.sqrt(total.sum(axis=1)).reshape(-1))

    def producer_sizes(self, checkpoint: Checkpoint) -> Array:
        """Estimate of the activations' sizes ``[channels]``: the L2 norms of the producer's rows."""
        sizes = np.empty(self.count)
        for start, stop in slabs(self.count, self.producer.cols):
            piece = self.producer.read(checkpoint, self.first + start, self.first + stop)
            sizes[start:stop] = np.linalg.norm(piece.astype(np.float64), axis=1)
        return sizes


class ChannelScales:
    """Scales that balance each set of channels, computed on demand.

    They are powers of two, by which the producer's rows are multiplied and the readers' columns divided.

    Args:
        checkpoint: checkpoint whose weights determine the sizes of the channels.
        measured: function that returns the activations' sizes ``[channels]`` of a set, or None if they were not
            measured.
        known: scales that were computed before, by `Channels.name`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        measured: Callable[[Channels], Array | None] = lambda channels: None,
        known: Mapping[str, Array] | None = None,
    ) -> None:
        self._checkpoint, self._measured = checkpoint, measured
        self._known = dict(known or {})
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def __call__(self, channels: Channels) -> Array:
        """Scales of a set, float32 ``[channels]``, computed by the first thread that asks for them."""
        name = channels.name
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._known:
                self._known[name] = self._compute(channels)
            return self._known[name]

    def exponents(self) -> dict[str, Array]:
        """All scales that have been computed, as int8 exponents of two, by `Channels.name`."""
        return {name: np.rint(np.log2(scales)).astype(np.int8) for name, scales in sorted(self._known.items())}

    def _compute(self, channels: Channels) -> Array:
        norms = channels.reader_norms(self._checkpoint)
        if channels.tolerance is None:
            return equal_columns(norms)
        sizes = self._measured(channels)
        if sizes is None:
            sizes = channels.producer_sizes(self._checkpoint)
        return even_sizes(norms, sizes, channels.tolerance)


@dataclass(frozen=True)
class Transform:
    """The balance and rotation of one weight ``[rows, cols]``.

    Args:
        reads: channels that the columns multiply; the columns are divided by their scales.
        input_rotation: size of the blocks of columns that are rotated; 1 for none.
        writes: channels that the rows from ``first`` on compute; these rows are multiplied by the scales.
        output_rotation: size of the blocks of these rows that are rotated; 1 for none.
        first: index of the first of these rows.
        count: number of these rows.
    """

    reads: Channels | None = None
    input_rotation: int = 1
    writes: Channels | None = None
    output_rotation: int = 1
    first: int = 0
    count: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether the transform changes nothing."""
        return self == IDENTITY

    @property
    def of_vector(self) -> Transform:
        """The same transform for the weight's bias, which has rows but no columns."""
        return replace(self, reads=None, input_rotation=1)

    def described(self) -> dict[str, Any]:
        """JSON for the manifest: the changes to the weight; empty if there are none."""
        entries: dict[str, Any] = {}
        if self.reads is not None or self.writes is not None:
            sides = {"columns": self.reads, "rows": self.writes}
            entries["balanced"] = [name for name, side in sides.items() if side is not None]
        if self.input_rotation > 1:
            entries["rotated"] = self.input_rotation
        if self.output_rotation > 1:
            entries["rows_rotated"] = self.output_rotation
        return entries

    def reader(self, read: Callable[[int, int], Array], scales: ChannelScales | None) -> Callable[[int, int], Array]:
        """A function that reads transformed rows, made from ``read(start, stop)`` for rows of the checkpoint."""
        if self.is_identity:
            return read
        assert scales is not None, "a transformed weight needs the scales of its channels"

        def transformed(start: int, stop: int) -> Array:
            low, high = self._whole_blocks(start, stop)
            piece = self.apply(read(low, high), low, scales)
            return piece[start - low : stop - low]

        return transformed

    def apply(self, piece: Array, start: int, scales: ChannelScales) -> Array:
        """Transforms rows of the weight.

        Args:
            piece: consecutive rows, ``[n, cols]``.
            start: index of the first of them.
            scales: scales of the channels.

        Returns:
            The transformed rows, float32.
        """
        piece = piece.astype(np.float32)
        if self.reads is not None:
            piece /= self.reads.along_columns(scales(self.reads))
        if self.input_rotation > 1:
            piece = rotate(piece, self.input_rotation)
        rows = self._own_rows(start, len(piece))
        if rows.stop > rows.start and (self.writes is not None or self.output_rotation > 1):
            own = piece[rows]
            if self.writes is not None:
                first = start + rows.start - self.first
                own = own * scales(self.writes)[first : first + len(own), None]
            piece[rows] = rotate(own.T, self.output_rotation).T
        return piece

    def undo(self, weight: Array, scales: ChannelScales) -> Array:
        """The original weight, float32 ``[rows, cols]``, from the whole transformed ``weight``."""
        rows = self._own_rows(0, len(weight))
        if rows.stop > rows.start and (self.writes is not None or self.output_rotation > 1):
            weight = weight.copy()
            own = rotate(weight[rows].T, self.output_rotation, back=True).T
            weight[rows] = own if self.writes is None else own / scales(self.writes)[:, None]
        if self.input_rotation > 1:
            weight = rotate(weight, self.input_rotation, back=True)
        return weight if self.reads is None else weight * self.reads.along_columns(scales(self.reads))

    def carry(self, products: Array, scales: ChannelScales, before: Transform, scales_before: ChannelScales) -> None:
        """Converts the Gram matrix ``Σ xᵀx`` of a weight's inputs from another transform to this one, in place.

        Args:
            products: Gram matrix of inputs to the weight transformed by ``before``, float32 ``[cols, cols]``.
            scales: scales of the channels in this transform.
            before: other transform of the same weight.
            scales_before: scales of the channels in that transform.
        """
        ratio = np.ones(len(products))
        if self.reads is not None:
            ratio *= self.reads.along_columns(scales(self.reads))
        if before.reads is not None:
            ratio /= before.reads.along_columns(scales_before(before.reads))
        if self.input_rotation == before.input_rotation and (ratio == 1).all():
            return
        # x becomes x M for a block-diagonal matrix M
        size = math.lcm(before.input_rotation, self.input_rotation)
        back = np.kron(np.eye(size // before.input_rotation), rotation_matrix(before.input_rotation).T)
        there = np.kron(np.eye(size // self.input_rotation), rotation_matrix(self.input_rotation))
        blocks = ((back * ratio.reshape(-1, 1, size)) @ there).astype(np.float32)
        for _ in range(2):  # Mᵀ Σ, then the same again on its transpose, because Σ is symmetric
            for block, start in zip(blocks, range(0, len(products), size), strict=True):
                products[start : start + size] = block.T @ products[start : start + size]
            _transpose(products)

    def undo_inputs(self, rows: Array, scales: ChannelScales) -> Array:
        """Inputs of the original weight, ``[n, cols]``, from inputs ``rows`` of the transformed weight."""
        rows = rotate(rows, self.input_rotation, back=True)
        return rows if self.reads is None else rows / self.reads.along_columns(scales(self.reads))

    def channel_squares(self, products: Array, scales: ChannelScales) -> Array:
        """``Σ x²`` of each input of the original weight, ``[cols]``, from ``Σ xᵀx`` for the transformed one."""
        size = self.input_rotation
        squares = np.empty(len(products))
        for start in range(0, len(products), size):
            block = products[start : start + size, start : start + size]
            block = rotate(rotate(block, size, back=True).T, size, back=True)
            squares[start : start + size] = block.diagonal()
        return squares if self.reads is None else squares / self.reads.along_columns(scales(self.reads)) ** 2

    def _own_rows(self, start: int, length: int) -> slice:
        """The part of the rows ``[start, start + length)`` that computes written channels, counted from ``start``."""
        low = min(max(self.first - start, 0), length)
        return slice(low, max(low, min(self.first + self.count - start, length)))

    def _whole_blocks(self, start: int, stop: int) -> tuple[int, int]:
        """The range of rows to read so that ``[start, stop)`` can be transformed: it cuts no block of rotated rows."""
        size = self.output_rotation
        if size == 1:
            return start, stop
        end = self.first + self.count
        if self.first < start < end:
            start -= (start - self.first) % size
        if self.first < stop < end:
            stop += -(stop - self.first) % size
        return start, stop


IDENTITY = Transform()


def _transpose(matrix: Array, side: int = 512) -> None:
    """Transposes a square matrix in place."""
    for start in range(0, len(matrix), side):
        rows = slice(start, start + side)
        matrix[rows, rows] = matrix[rows, rows].T.copy()
        for first in range(start + side, len(matrix), side):
            cols = slice(first, first + side)
            kept = matrix[rows, cols].copy()
            matrix[rows, cols] = matrix[cols, rows].T
            matrix[cols, rows] = kept.T


def packed_scales(exponents: Mapping[str, Array]) -> dict[str, str]:
    """Exponents of two, by name, as text for a manifest: int8, compressed (most are 0), in base64."""
    return {name: base64.b64encode(zlib.compress(values.tobytes(), 9)).decode() for name, values in exponents.items()}


def unpacked_scales(packed: Mapping[str, str]) -> dict[str, Array]:
    """Scales ``[channels]``, by name, from the text that `packed_scales` makes; the text is not trusted.

    Raises:
        ValueError: an entry is not base64, not compressed data, too long, or has scales that no build chooses.
    """
    scales = {}
    for name, text in packed.items():
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(base64.b64decode(text, validate=True), MAX_CHANNELS)
        except (TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"the scales of {name} are damaged: {error}") from None
        if stream.unconsumed_tail or not stream.eof:
            raise ValueError(f"the scales of {name} are damaged or too many")
        scales[name] = np.exp2(np.frombuffer(data, np.int8).astype(np.float32))
        if scales[name].max(initial=1) > LARGEST or scales[name].min(initial=1) < 1 / LARGEST:
            raise ValueError(f"the scales of {name} are not between 1/{LARGEST:.0f} and {LARGEST:.0f}")
    return scales
