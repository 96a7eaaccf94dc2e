"""4- and 8-bit weights in blocks along the input dimension: the layout of onnxruntime's MatMulNBits.

A matrix [rows, cols] has ``n = ceil(cols / block_size)`` blocks per row, the last of which is padded with zeros. It is
stored as these arrays: ``qweight``, uint8 [rows, n, block_size · bits / 8], where the earlier of two 4-bit codes is in
the lower half of a byte; ``scales`` [rows, n]; and for asymmetric blocks ``zero_points``, uint8
[rows, ceil(n · bits / 8)], packed in the same way. Without zero points the code for zero is ``2 ** (bits - 1)``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class BlockShapes(NamedTuple):
    """Shapes of the three arrays that a quantized matrix consists of."""

    qweight: tuple[int, ...]
    scales: tuple[int, ...]
    zero_points: tuple[int, ...]


class QuantizedBlocks(NamedTuple):
    """A quantized matrix: codes, scales and, for asymmetric blocks, zero points, in the layout of this module.

    Narrow scales are int8 [rows, n], as multiples of their row's step, which is in ``steps``, float32 [rows, 1].
    """

    qweight: Array
    scales: Array
    zero_points: Array | None
    steps: Array | None = None

    @property
    def true_scales(self) -> Array:
        """The scales that codes are multiplied by, float32 [rows, n], also if they are stored as narrow scales."""
        scales = self.scales.astype(np.float32)
        return scales if self.steps is None else scales * self.steps


def block_shapes(rows: int, cols: int, bits: int, block_size: int) -> BlockShapes:
    """Shapes of the arrays that `quantize_blocks` returns for a matrix [rows, cols]."""
    n = -(-cols // block_size)
    return BlockShapes((rows, n, block_size * bits // 8), (rows, n), (rows, -(-n * bits // 8)))


TILE = 33 << 12
"""Number of values that are rounded at a time: few enough for a core's cache, and enough that the cost of calls does
not matter. It is not a power of two, because the rows of the buffers would then compete for the same cache lines."""

FACTORS, ROTATED_FACTORS = (1.0, 0.93, 1.05), (1.0, 0.93, 1.07, 1.14)
"""Factors by which the candidate 4-bit grids of a block are finer than the grid that spans the block's range, for plain
and for rotated weights. Above 1, a grid cuts off the ends of the range. One factor is usually close to the best."""


def quantize_blocks(
    weight: Array,
    bits: int,
    block_size: int,
    symmetric: bool,
    *,
    rotated: bool = False,
    narrow: bool = False,
    grids_only: bool = False,
) -> QuantizedBlocks:
    """Rounds each block of a matrix to ``scale · (code - zero_point)``, with the nearest code for each value.

    The scale of an 8-bit block is chosen so that the codes span the block's range: ±127, or with a zero point 255 steps
    from the smallest to the largest value. For 4 bits, that grid is the first of several candidates (if it is
    symmetric, it puts the value of largest magnitude, with its sign, on the code -8, and so uses 16 levels instead of
    15); the other candidates are finer or coarser by `FACTORS`. The error of a grid is the sum of squared errors,
    weighted by the values' magnitudes: ``e(s) = Σ |w| (w - s q)²`` for weights w, codes q and the scale s. It protects
    the few large weights that models depend on; the plain squared error gives worse answers (docs/results.md). For the
    codes of one grid, e is smallest at ``s = Σ |w| w q / Σ |w| q²``, where it is lower than at s = 0 by
    ``(Σ |w| w q)² / Σ |w| q²``. The grid with the smallest e is chosen, and w is rounded once more with its s. So no
    block has a larger e than with the grid that spans its range.

    Args:
        weight: matrix [rows, cols] in any float dtype; it is rounded as float32.
        bits: bits per code, 4 or 8.
        block_size: number of values that share a scale; a power of two.
        symmetric: whether blocks have no zero points, so that zero is the middle code.
        rotated: whether the matrix was rotated, so that its values are nearly normally distributed, without a few large
            ones; then the plain squared error is minimized.
        narrow: whether scales are stored in 8 bits, as multiples of 1/127 of the largest scale of their row.
        grids_only: whether only scales and zero points are needed, because the caller chooses the codes; ``qweight`` of
            the result is then not initialized.
    """
    rows, cols = weight.shape
    shapes = block_shapes(rows, cols, bits, block_size)
    count = rows * shapes.scales[1]
    if count * block_size != rows * cols:
        weight = np.pad(weight, ((0, 0), (0, shapes.scales[1] * block_size - cols)))
    blocks = weight.reshape(count, block_size)
    qweight = np.empty((count, shapes.qweight[2]), np.uint8)
    scales, zeros = np.empty(count, np.float32), np.empty(count, np.float32)
    levels, middle = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    step = max(1, TILE // block_size)
    buffers = np.empty((4, block_size, min(step, count)), np.float32)
    for start in range(0, count, step):
        tile = slice(start, min(start + step, count))
        # blocks are columns here, so that every operation runs along contiguous memory
        work = buffers[:, :, : tile.stop - start]
        _turn(blocks[tile], out=work[0], spare=work[1])
        scales[tile], zeros[tile] = _grids(work, bits, symmetric, rotated)
        if not (narrow or grids_only):
            _round(work[0], np.float32(1), middle if symmetric else zeros[tile], levels, work[2])
            qweight[tile] = _packed(work[2], zeros[tile], bits).T
    steps = None
    if narrow:
        scales, steps = _narrowed(scales.reshape(rows, -1))
        true = (scales * steps).reshape(-1)
        for start in range(0, 0 if grids_only else count, step):
            tile = slice(start, min(start + step, count))
            work = buffers[:, :, : tile.stop - start]
            _turn(blocks[tile], out=work[0], spare=work[1])
            work[0] /= true[tile]
            _round(work[0], np.float32(1), middle if symmetric else zeros[tile], levels, work[2])
            qweight[tile] = _packed(work[2], zeros[tile], bits).T
    zero_points = None if symmetric else pack(zeros.reshape(rows, -1).astype(np.uint8), bits)
    return QuantizedBlocks(qweight.reshape(shapes.qweight), scales.reshape(shapes.scales), zero_points, steps)


def _narrowed(scales: Array) -> tuple[Array, Array]:
    """Scales ``[rows, n]`` as int8 multiples of their row's step, none of them 0, and the steps ``[rows, 1]``."""
    steps = np.abs(scales).max(axis=1, keepdims=True) / np.float32(127)
    np.maximum(steps, np.finfo(np.float32).tiny, out=steps)
    counts = np.rint(scales / steps)
    np.copyto(counts, np.copysign(np.float32(1), scales), where=counts == 0)
    return np.clip(counts, -127, 127).astype(np.int8), steps


def _turn(blocks: Array, out: Array, spare: Array) -> None:
    """Transposes ``blocks [n, block_size]`` into ``out``, float32 [block_size, n].

    ``spare`` is scratch space of the same shape and dtype as ``out``.
    """
    if blocks.dtype == ml_dtypes.bfloat16 and sys.byteorder == "little":
        # pairs of values are transposed as one uint32; a bfloat16 is the upper half of the float32 of the same value
        pairs, bits = spare.view(np.uint32)[: len(out) // 2], out.view(np.uint32)
        pairs[...] = blocks.view(np.uint32).T
        np.left_shift(pairs, np.uint32(16), out=bits[0::2])
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=bits[1::2])
    else:
        out[...] = blocks.astype(np.float32, copy=False).T


def _grids(work: Array, bits: int, symmetric: bool, rotated: bool) -> tuple[Array, Any]:
    """Scales [blocks] and zero points ([blocks], or one number for all) of the blocks in ``work[0]``.

    ``work`` is four arrays [block_size, blocks]. Afterwards the first holds the blocks divided by their scales; the
    other three are overwritten with intermediate values.
    """
    x, magnitudes, steps, products = work
    levels = np.float32((1 << bits) - 1)
    top, bottom = x.max(axis=0), x.min(axis=0)
    if not symmetric:
        # the range must hold zero, so that padding and true zeros stay exact
        top, bottom = np.maximum(top, 0), np.minimum(bottom, 0)
        scales = top / levels - bottom / levels
    elif bits == 4:
        scales = np.where(top > -bottom, top, bottom) / np.float32(-8)
    else:
        scales = np.maximum(top, -bottom) / np.float32(127)
    np.putmask(scales, scales == 0, 1)
    x /= scales  # from here on x counts steps, so that no sum leaves float32's range
    first = bottom / scales

    def zero_points(factor: np.float32) -> Any:
        if symmetric:
            return np.float32(1 << (bits - 1))
        # a finer grid does not reach the ends of the range: cut off as much at either end
        nearest: Array = np.rint(levels * (1 - factor) / 2 - first * factor)
        return np.clip(nearest, 0, levels, out=nearest)

    zeros = zero_points(np.float32(1))
    if bits == 4:
        if rotated:
            magnitudes[...] = 1
        else:
            np.abs(x, out=magnitudes)
        # those of the best grid so far; blocks of zeros keep a gain of zero
        gain, ratio = np.zeros_like(scales), np.ones_like(scales)
        for factor in map(np.float32, ROTATED_FACTORS if rotated else FACTORS):
            these = zero_points(factor)
            _round(x, factor, these, levels, steps)
            np.multiply(magnitudes, steps, out=products)  # x and the steps have the same sign, which cancels
            steps *= products
            products *= x
            below, above = _totals(work[2:])  # Σ |x| q², Σ |x| x q
            np.maximum(below, np.float32(1e-30), out=below)
            this = above * above / below
            better = this > gain
            np.maximum(gain, this, out=gain)
            np.putmask(ratio, better, above / below)
            if not symmetric:
                np.putmask(zeros, better, these)
        scales *= ratio
        x /= ratio
    return scales, zeros


def _round(x: Array, factor: np.float32, zeros: Any, levels: np.float32, out: Array) -> None:
    """Rounds ``factor · x`` to whole steps, and clips them so that steps plus ``zeros`` are codes, ``0 … levels``."""
    if factor == 1:
        np.rint(x, out=out)
    else:
        np.multiply(x, factor, out=out)
        np.rint(out, out=out)
    if zeros.ndim:  # np.clip is faster with numbers as bounds, and slower with arrays
        np.maximum(out, -zeros, out=out)
        np.minimum(out, levels - zeros, out=out)
    else:
        np.clip(out, -zeros, levels - zeros, out=out)


def _totals(values: Array) -> Array:
    """Sums over the second to last axis: ``values [.., block_size, blocks]`` → [.., blocks], a view of ``values``.

    ``values`` are overwritten. Halves are added to each other, because that order does not depend on the number of
    blocks, as the order of numpy's own sum does.
    """
    while values.shape[-2] > 1:
        half = values.shape[-2] // 2
        np.add(values[..., :half, :], values[..., half:, :], out=values[..., :half, :])
        values = values[..., :half, :]
    total: Array = values[..., 0, :]
    return total


def _packed(steps: Array, zeros: Array, bits: int) -> Array:
    """Packed codes of ``steps [block_size, blocks]``, uint8 [block_size · bits / 8, blocks]; overwrites ``steps``."""
    if bits == 8:
        steps += zeros
        return steps.astype(np.uint8)
    # still in float32, which is exact: two codes make a whole number below 256
    pairs = steps[1::2]
    pairs *= 16
    pairs += steps[0::2]
    pairs += 17 * zeros
    return pairs.astype(np.uint8)


def dequantize_blocks(blocks: QuantizedBlocks, cols: int, bits: int) -> Array:
    """The matrix that quantized blocks represent, float32 [rows, cols]."""
    codes = unpack(blocks.qweight, bits).astype(np.float32)  # [rows, n, block_size]
    rows, n, block_size = codes.shape
    if blocks.zero_points is None:
        codes -= 1 << (bits - 1)
    else:
        codes -= unpack(blocks.zero_points, bits)[:, :n, None]
    codes *= blocks.true_scales[:, :, None]
    return codes.reshape(rows, n * block_size)[:, :cols]


def pack(codes: Array, bits: int) -> Array:
    """Packs codes into bytes along the last axis: two adjacent 4-bit codes per byte, the earlier in its lower half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """Unpacks codes from bytes along the last axis; the inverse of `pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
