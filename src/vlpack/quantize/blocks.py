"""4- and 8-bit weights in blocks along the input dimension: the layout of ORT's MatMulNBits.

For a matrix [rows, cols] and blocks of ``block_size`` there are ``n = ceil(cols / block_size)`` blocks per row; the
last is padded with zeros. ``qweight`` is uint8 [rows, n, block_size · bits / 8], the earlier of two 4-bit codes in the
lower half of its byte; ``scales`` [rows, n]; ``zero_points``, where the blocks are asymmetric, uint8
[rows, ceil(n · bits / 8)] packed the same way. Without zero points the code for zero is ``2 ** (bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class BlockShapes(NamedTuple):
    """The shapes of the three arrays."""

    qweight: tuple[int, ...]
    scales: tuple[int, ...]
    zero_points: tuple[int, ...]


class QuantizedBlocks(NamedTuple):
    """Codes, scales and, where asymmetric, zero points; layout in the module's docstring."""

    qweight: Array
    scales: Array
    zero_points: Array | None


def block_shapes(rows: int, cols: int, bits: int, block_size: int) -> BlockShapes:
    """Shapes of what `quantize_blocks` makes of a [rows, cols] matrix."""
    n = -(-cols // block_size)
    return BlockShapes((rows, n, block_size * bits // 8), (rows, n), (rows, -(-n * bits // 8)))


TILE = 1 << 16
"""Values that are rounded at a time: small enough that the buffers stay in a core's cache."""

FACTORS = (1.0, 0.93, 1.05)
"""How much finer than a block's range its 4-bit grid may be (above 1 it cuts the ends off): one is near the best."""


def quantize_blocks(weight: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedBlocks:
    """Round each block to ``scale · (code - zero_point)``, to the nearest code.

    8-bit blocks take the scale that holds their values: ±127, or with a zero point 255 steps from the least to the
    largest. In 4 bits that is the first of several grids (a symmetric one has the value of largest magnitude, with its
    sign, on the code -8: 16 levels and not 15), the others are finer or coarser by `FACTORS`. Errors count by their
    value's magnitude, ``e(s) = Σ |w| (w - s q)²``, since models hang on their few large weights: the least error alone
    rounds those worse and answers worse (docs/results.md). For the codes q of a grid ``s = Σ |w| w q / Σ |w| q²`` has
    the least e, by ``(Σ |w| w q)² / Σ |w| q²`` below that of s = 0. The best grid wins, and w is rounded once more with
    its s. So no block has a larger e than its range's own grid gives it.

    Args:
        weight: float32 [rows, cols].
        bits: 4 or 8.
        block_size: values that share a scale; a power of two.
        symmetric: no zero points, zero is the middle code.
    """
    rows, cols = weight.shape
    shapes = block_shapes(rows, cols, bits, block_size)
    count = rows * shapes.scales[1]
    if count * block_size != rows * cols:
        weight = np.pad(weight, ((0, 0), (0, shapes.scales[1] * block_size - cols)))
    blocks = weight.reshape(count, block_size)
    qweight = np.empty((count, shapes.qweight[2]), np.uint8)
    scales, zeros = np.empty(count, np.float32), np.empty(count, np.float32)
    step = max(1, TILE // block_size)
    buffers = np.empty((4, block_size, min(step, count)), np.float32)
    for start in range(0, count, step):
        tile = slice(start, min(start + step, count))
        # blocks are columns here, so that everything runs along them
        x, codes, *spare = buffers[:, :, : tile.stop - start]
        x[...] = blocks[tile].T
        scales[tile], zeros[tile] = _encode(x, codes, spare, bits, symmetric)
        qweight[tile] = pack(codes.astype(np.uint8), bits, axis=0).T
    zero_points = None if symmetric else pack(zeros.reshape(rows, -1).astype(np.uint8), bits)
    return QuantizedBlocks(qweight.reshape(shapes.qweight), scales.reshape(shapes.scales), zero_points)


def _encode(x: Array, codes: Array, spare: Sequence[Array], bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Scales and zero points [blocks] of ``x [block_size, blocks]``, and its ``codes``; x and two more are spoilt."""
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
    scales[scales == 0] = 1
    x /= scales  # from here on in steps, so that no sum leaves float32's range
    first = bottom / scales

    def zero_points(factor: np.float32) -> Array:
        if symmetric:
            return np.full_like(scales, 1 << (bits - 1))
        # what a finer grid cuts off, it cuts off at both ends
        nearest: Array = np.rint(levels * (1 - factor) / 2 - first * factor)
        return np.clip(nearest, 0, levels, out=nearest)

    zeros = zero_points(np.float32(1))
    if bits == 4:
        magnitudes, products = np.abs(x, out=spare[0]), spare[1]
        gain, ratio = np.zeros_like(scales), np.ones_like(scales)  # of the best so far; blocks of zeros have no gain
        for factor in map(np.float32, FACTORS):
            these = zero_points(factor)
            _round(x, factor, these, levels, codes)
            np.multiply(x, codes, out=products)  # never negative
            np.abs(codes, out=codes)
            codes *= products
            below = np.maximum(_total(codes), np.float32(1e-30))  # Σ |x| q²
            products *= magnitudes
            above = _total(products)  # Σ |x| x q
            better = above * above / below > gain
            gain = np.where(better, above * above / below, gain)
            ratio, zeros = np.where(better, above / below, ratio), np.where(better, these, zeros)
        scales *= ratio
        x /= ratio
    _round(x, np.float32(1), zeros, levels, codes)
    codes += zeros
    return scales, zeros


def _round(x: Array, factor: np.float32, zeros: Array, levels: np.float32, out: Array) -> None:
    """The whole steps next to ``factor · x``, as far as there are codes around ``zeros``."""
    if factor == 1:
        np.rint(x, out=out)
    else:
        np.multiply(x, factor, out=out)
        np.rint(out, out=out)
    np.maximum(out, -zeros, out=out)
    np.minimum(out, levels - zeros, out=out)


def _total(values: Array) -> Array:
    """Sums [blocks] of ``values [block_size, blocks]``, which are spoilt.

    Halves are added, in an order that does not hang on how many blocks there are, as numpy's own does.
    """
    while len(values) > 1:
        half = len(values) // 2
        np.add(values[:half], values[half:], out=values[:half])
        values = values[:half]
    total: Array = values[0].copy()
    return total


def dequantize_blocks(blocks: QuantizedBlocks, cols: int, bits: int) -> Array:
    """The float32 [rows, cols] that the codes stand for."""
    codes = unpack(blocks.qweight, bits).astype(np.float32)  # [rows, n, block_size]
    rows, n, block_size = codes.shape
    if blocks.zero_points is None:
        codes -= 1 << (bits - 1)
    else:
        codes -= unpack(blocks.zero_points, bits)[:, :n, None]
    codes *= blocks.scales.astype(np.float32)[:, :, None]
    return codes.reshape(rows, n * block_size)[:, :cols]


def pack(codes: Array, bits: int, axis: int = -1) -> Array:
    """Codes as bytes: two 4-bit ones that follow each other along ``axis`` in one, the earlier in its lower half."""
    if bits == 8:
        return codes
    codes = np.moveaxis(codes, axis, 0)
    if len(codes) % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[:1])])
    packed: Array = codes[0::2] | (codes[1::2] << 4)
    return np.moveaxis(packed, 0, axis)


def unpack(packed: Array, bits: int) -> Array:
    """The codes in bytes, along the last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
