"""The storage of a weight in the data file: the arrays that it becomes, and their contents as a stream of chunks.

A `Storage` is a frozen dataclass, printed by ``inspect``, with two main methods. `Storage.arrays` gives the dtype and
shape of every initializer that a weight of ``rows × cols`` becomes. `Storage.chunks` gives those arrays' contents in
file order, made from a reader of row slabs, so that no weight is held in memory as a whole unless its layout requires
it. This module is independent of ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlpack.quantize.blocks import QuantizedBlocks, block_shapes, dequantize_blocks, pack, quantize_blocks
from vlpack.quantize.channels import ZERO_POINT, dequantize_rows, quantize_rows, unsigned
from vlpack.quantize.gptq import HessianFactor, gptq_round_blocks, gptq_round_rows

Array = npt.NDArray[Any]
#: ``read(start, stop)`` → rows [stop - start, cols] of the checkpoint's weight, in its own dtype
RowReader = Callable[[int, int], Array]
#: array name → (dtype, shape)
ArraySpecs = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

SLAB = 1 << 22
"""Number of elements handled at a time: 16 MiB in fp32, so that the working set is a few slabs of moderate size."""


GPTQ_SLAB = 2 * SLAB
"""Number of elements that GPTQ rounds at a time: the more rows, the less its loop over columns costs."""


def slabs(rows: int, cols: int, elements: int = SLAB) -> Iterator[tuple[int, int]]:
    """Row ranges ``(start, stop)`` of about equal length, at most ``elements`` elements each, that cover ``rows``."""
    most = max(1, elements // max(cols, 1))
    step = max(1, -(-rows // max(1, -(-rows // most))))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def transposed(matrix: Array) -> Array:
    """Transposed copy of a matrix, ``[rows, cols]`` → ``[cols, rows]``, made in strips that fit into the cache.

    Each row of a strip is padded by one cache line. Without padding, the distance between rows would often be a power
    of two, and all values of a column would compete for the same few cache lines.
    """
    rows, cols = matrix.shape
    out = np.empty((cols, rows), matrix.dtype)
    strip = np.empty((64, cols + 64 // matrix.itemsize), matrix.dtype)[:, :cols]
    for start in range(0, rows, 64):
        piece = strip[: rows - start]
        piece[...] = matrix[start : start + 64]
        out[:, start : start + 64] = piece.T
    return out


class KeptReader(Protocol):
    """A reader of a quantized checkpoint's codes, by rows (`vlpack.quantize.kept.KeptRows`)."""

    def codes(self, start: int, stop: int) -> Array:
        """Unsigned codes, uint8 ``[stop - start, cols]``."""

    def scales(self, start: int, stop: int) -> Array:
        """Scales, float32 ``[stop - start, groups]``."""

    def zeros(self, start: int, stop: int) -> Array:
        """Zero points, uint8 ``[stop - start, groups]``."""


class Storage(Protocol):
    """The way a weight of ``rows × cols`` is stored: its arrays, their contents, and the values that they represent."""

    @property
    def label(self) -> str:
        """Name of the storage in the manifest and in ``inspect``."""

    def arrays(self, rows: int, cols: int) -> ArraySpecs:
        """Dtype and shape of each array, by its name, the largest array first."""

    def chunks(self, read: RowReader, rows: int, cols: int) -> Iterator[tuple[str, Array]]:
        """Names and contiguous pieces of the arrays; an array is complete before the next one begins."""

    def values(
        self, arrays: Mapping[str, Array], rows: int, cols: int, start: int = 0, stop: int | None = None
    ) -> Array:
        """The values that stored arrays represent, whatever shapes a graph gives the arrays.

        Returns:
            Rows ``[start, stop)`` of the weight, float32.
        """


@dataclass(frozen=True)
class Float:
    """A weight in the checkpoint's layout, cast to ``dtype``; used for embeddings, heads, norms, biases and tables."""

    dtype: str = "float32"

    @property
    def label(self) -> str:
        return self.dtype

    def arrays(self, rows: int, cols: int) -> ArraySpecs:
        return {"weight": (np.dtype(self.dtype), (rows, cols))}

    def chunks(self, read: RowReader, rows: int, cols: int) -> Iterator[tuple[str, Array]]:
        for start, stop in slabs(rows, cols):
            yield "weight", cast(read(start, stop), self.dtype)

    def values(
        self, arrays: Mapping[str, Array], rows: int, cols: int, start: int = 0, stop: int | None = None
    ) -> Array:
        return arrays["weight"].reshape(rows, cols)[start:stop].astype(np.float32)


@dataclass(frozen=True)
class Transposed:
    """A transposed weight, ``[cols, rows]``, cast to ``dtype``: the right operand of MatMul."""

    dtype: str = "float32"

    @property
    def label(self) -> str:
        return self.dtype

    def arrays(self, rows: int, cols: int) -> ArraySpecs:
        return {"weight": (np.dtype(self.dtype), (cols, rows))}

    def chunks(self, read: RowReader, rows: int, cols: int) -> Iterator[tuple[str, Array]]:
        whole = read(0, rows)
        for start, stop in slabs(cols, rows):
            yield "weight", cast(transposed(whole[:, start:stop]), self.dtype)

    def values(
        self, arrays: Mapping[str, Array], rows: int, cols: int, start: int = 0, stop: int | None = None
    ) -> Array:
        return np.ascontiguousarray(arrays["weight"].reshape(cols, rows)[:, start:stop].T, np.float32)


@dataclass(frozen=True)
class ChannelInt8:
    """A weight in 8 bits with one scale per output channel, transposed for MatMulIntegerToFloat.

    ``signed`` codes are two to three times as fast on processors with instructions for u8 × s8 products (VNNI, AMX,
    ARM's). Other x86 processors add such products in pairs of 16 bits, which saturate (see `vlpack.ort.saturation`);
    unsigned codes around 128 have an exact kernel there. ``calibrated`` codes are rounded by GPTQ
    (`vlpack.quantize.gptq`). ``kept`` codes and scales are those of a quantized checkpoint.
    """

    signed: bool = True
    calibrated: bool = False
    kept: bool = False

    @property
    def label(self) -> str:
        kinds = {" calibrated": self.calibrated, " kept": self.kept}
        return ("int8" if self.signed else "uint8") + "".join(kind for kind, has in kinds.items() if has)

    def arrays(self, rows: int, cols: int) -> ArraySpecs:
        return {
            "qweight": (np.dtype(np.int8 if self.signed else np.uint8), (cols, rows)),
            "scales": (np.dtype(np.float32), (rows,)),
        }

    def chunks(
        self, read: RowReader, rows: int, cols: int, factor: HessianFactor | None = None
    ) -> Iterator[tuple[str, Array]]:
        """Chunks of the arrays, rounded to the nearest codes, or with ``factor`` by GPTQ with the same scales."""
        whole = np.empty((rows, cols), np.int8)
        scales = np.empty(rows, np.float32)
        for start, stop in slabs(rows, cols, SLAB if factor is None else GPTQ_SLAB):
            weight = read(start, stop).astype(np.float32)
            spare = weight if factor is None else weight.copy()
            whole[start:stop], scales[start:stop] = quantize_rows(spare)
            if factor is not None:
                whole[start:stop] = gptq_round_rows(weight, scales[start:stop], factor)
        yield from self._finished(whole, scales)

    def kept_chunks(self, kept: KeptReader, rows: int, cols: int) -> Iterator[tuple[str, Array]]:
        """Chunks of the arrays with the codes and scales of a quantized checkpoint."""
        whole = np.empty((rows, cols), np.int8)
        scales = np.empty(rows, np.float32)
        for start, stop in slabs(rows, cols):
            whole[start:stop] = unsigned(kept.codes(start, stop)).view(np.int8)  # the shift is its own inverse
            scales[start:stop] = kept.scales(start, stop)[:, 0]
        yield from self._finished(whole, scales)

    def _finished(self, whole: Array, scales: Array) -> Iterator[tuple[str, Array]]:
        """Chunks of the arrays, from all signed codes ``[rows, cols]`` and scales ``[rows]``."""
        for start, stop in slabs(*whole.shape[::-1]):
            codes = transposed(whole[:, start:stop])
            yield "qweight", codes if self.signed else unsigned(codes)
        yield "scales", scales

    def values(
        self, arrays: Mapping[str, Array], rows: int, cols: int, start: int = 0, stop: int | None = None
    ) -> Array:
        codes = arrays["qweight"].reshape(cols, rows)[:, start:stop].T
        return dequantize_rows(codes, arrays["scales"][start:stop], 0 if self.signed else ZERO_POINT)


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks along the input dimension, each with a scale and perhaps a zero point, for MatMulNBits.

    A code has ``bits`` bits, and ``block_size`` codes share a scale. ``dtype`` is the dtype of the activations, and of
    the scales when the kernel receives them. ``narrow`` scales are stored in 8 bits, as multiples of a step per row;
    codes are chosen for the scale as it is stored, so that only the choice of grids becomes coarser.
    ``accuracy_level`` is the way the CPU multiplies: 4 quantizes the activations to 8 bits per block, 1 keeps them in
    fp32. ``calibrated`` weights are rounded by GPTQ (`vlpack.quantize.gptq`). ``rotated`` weights have rotated columns
    and are nearly normally distributed. ``kept`` codes, scales and zero points are those of a quantized checkpoint.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    dtype: str = "float32"
    accuracy_level: int = 4
    calibrated: bool = False
    rotated: bool = False
    narrow: bool = False
    kept: bool = False

    @property
    def label(self) -> str:
        kinds = {" asymmetric": not self.symmetric, " 8-bit scales": self.narrow, " calibrated": self.calibrated}
        kinds[" kept"] = self.kept
        return f"int{self.bits} block {self.block_size}" + "".join(kind for kind, has in kinds.items() if has)

    def arrays(self, rows: int, cols: int) -> ArraySpecs:
        shapes = block_shapes(rows, cols, self.bits, self.block_size)
        specs: ArraySpecs = {
            "qweight": (np.dtype(np.uint8), shapes.qweight),
            "scales": (np.dtype(np.int8 if self.narrow else self.dtype), shapes.scales),
        }
        if self.narrow:
            specs["steps"] = (np.dtype(np.float32), (rows, 1))
        if not self.symmetric:
            specs["zero_points"] = (np.dtype(np.uint8), shapes.zero_points)
        return specs

    def chunks(
        self, read: RowReader, rows: int, cols: int, factor: HessianFactor | None = None
    ) -> Iterator[tuple[str, Array]]:
        """Chunks of the arrays, rounded to the nearest codes, or by GPTQ on the same grids if ``factor`` is given."""
        specs = self.arrays(rows, cols)
        small = {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items() if name != "qweight"}
        for start, stop in slabs(rows, cols, SLAB if factor is None else GPTQ_SLAB):
            weight = read(start, stop)
            blocks = quantize_blocks(
                weight,
                self.bits,
                self.block_size,
                self.symmetric,
                rotated=self.rotated,
                narrow=self.narrow,
                grids_only=factor is not None,
            )
            if not self.narrow:
                blocks = blocks._replace(scales=cast(blocks.scales, self.dtype))
            if factor is not None:
                blocks = gptq_round_blocks(weight, blocks, factor, self.bits, self.block_size)
            small["scales"][start:stop] = blocks.scales
            if self.narrow:
                small["steps"][start:stop] = blocks.steps
            if not self.symmetric:
                small["zero_points"][start:stop] = blocks.zero_points
            yield "qweight", blocks.qweight
        yield from small.items()

    def kept_chunks(self, kept: KeptReader, rows: int, cols: int) -> Iterator[tuple[str, Array]]:
        """Chunks of the arrays with the codes, scales and zero points of a quantized checkpoint.

        A group there may be several blocks here, or end within a block if it is the last of a row; then the block is
        padded with zero points, which stand for zeros.
        """
        specs = self.arrays(rows, cols)
        small = {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items() if name != "qweight"}
        n = specs["scales"][1][1]
        for start, stop in slabs(rows, cols):
            codes, scales, zeros = (read(start, stop) for read in (kept.codes, kept.scales, kept.zeros))
            repeats = -(-n // scales.shape[1])  # blocks in a group
            scales, zeros = (np.repeat(values, repeats, axis=1) for values in (scales, zeros))
            if padding := n * self.block_size - cols:
                codes = np.concatenate([codes, np.repeat(zeros[:, -1:], padding, axis=1)], axis=1)
            small["scales"][start:stop] = cast(scales, self.dtype)
            if not self.symmetric:
                small["zero_points"][start:stop] = pack(zeros, self.bits)
            yield "qweight", pack(codes.reshape(stop - start, n, self.block_size), self.bits)
        yield from small.items()

    def values(
        self, arrays: Mapping[str, Array], rows: int, cols: int, start: int = 0, stop: int | None = None
    ) -> Array:
        shapes = block_shapes(rows, cols, self.bits, self.block_size)
        zeros = None if self.symmetric else arrays["zero_points"].reshape(shapes.zero_points)[start:stop]
        qweight, scales = arrays["qweight"].reshape(shapes.qweight), arrays["scales"].reshape(shapes.scales)
        steps = arrays["steps"].reshape(rows, 1)[start:stop] if self.narrow else None
        blocks = QuantizedBlocks(qweight[start:stop], scales[start:stop], zeros, steps)
        return dequantize_blocks(blocks, cols, self.bits)


def is_kept(storage: Storage | None) -> bool:
    """Whether a storage holds the codes of a quantized checkpoint, so that its values must not be transformed."""
    return isinstance(storage, Blocks | ChannelInt8) and storage.kept


def cast(array: Array, dtype: str) -> Array:
    """An array converted to ``dtype``, to float16 by way of float32.

    Raises:
        OverflowError: a value is not finite in ``dtype``; the largest magnitude of float16 is 65504.
    """
    if array.dtype == dtype:
        return array
    wide = array.astype(np.float32)
    if dtype == "float32":
        return wide
    with np.errstate(over="ignore"):  # values that leave the range are reported below
        narrow = wide.astype(dtype)
    if not np.isfinite(narrow).all():
        raise OverflowError(f"{np.abs(wide).max():.3g} does not fit {dtype}")
    return narrow


__all__ = ["Array", "Blocks", "ChannelInt8", "Float", "RowReader", "Storage", "Transposed"]
