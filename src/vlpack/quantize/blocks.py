"""4- and 8-bit weights in blocks along the input dimension: the layout of ORT's MatMulNBits.

For a matrix [rows, cols] and blocks of ``block_size`` there are ``n = ceil(cols / block_size)`` blocks per row; the
last is padded with zeros. ``qweight`` is uint8 [rows, n, block_size · bits / 8], the earlier of two 4-bit codes in the
lower half of its byte; ``scales`` [rows, n]; ``zero_points``, where the blocks are asymmetric, uint8
[rows, ceil(n · bits / 8)] packed the same way. Without zero points the code for zero is ``2 ** (bits - 1)``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class BlockShapes(NamedTuple):
    """The shapes of the three arrays."""

    qweight: tuple[int, ...]
    scales: tuple[int, ...]
    zero_points: tuple[int, ...]


class QuantizedBlocks(NamedTuple):
    """Codes, scales and, where asymmetric, zero points; layout in the module's docstring.

    Narrow scales are int8 [rows, n], in the steps [rows, 1], float32, of their rows.
    """

    qweight: Array
    scales: Array
    zero_points: Array | None
    steps: Array | None = None

    @property
    def true_scales(self) -> Array:
        """What a code's step is, float32 [rows, n]."""
        scales = self.scales.astype(np.float32)
        return scales if self.steps is None else scales * self.steps


def block_shapes(rows: int, cols: int, bits: int, block_size: int) -> BlockShapes:
    """Shapes of what `quantize_blocks` makes of a [rows, cols] matrix."""
    n = -(-cols // block_size)
    return BlockShapes((rows, n, block_size * bits // 8), (rows, n), (rows, -(-n * bits // 8)))


TILE = 33 << 12
"""Values that are rounded at a time: few enough for a core's cache, and enough that calls do not count. Not a power of
two, or the rows of the buffers would get in each other's way in the cache."""

FACTORS, ROTATED_FACTORS = (1.0, 0.93, 1.05), (1.0, 0.93, 1.07, 1.14)
"""How much finer than a block's range its 4-bit grid may be (above 1 it cuts the ends off): one is near the best."""


def quantize_blocks(
    weight: Array, bits: int, block_size: int, symmetric: bool, *, rotated: bool = False, narrow: bool = False
) -> QuantizedBlocks:
    """Round each block to ``scale · (code - zero_point)``, to the nearest code.

    8-bit blocks take the scale that holds their values: ±127, or with a zero point 255 steps from the least to the
    largest. In 4 bits that is the first of several grids (a symmetric one has the value of largest magnitude, with its
    sign, on the code -8: 16 levels and not 15), the others are finer or coarser by `FACTORS`. Errors count by their
    value's magnitude, ``e(s) = Σ |w| (w - s q)²``, since models hang on their few large weights: the least error alone
    rounds those worse and answers worse (docs/results.md). For the codes q of a grid ``s = Σ |w| w q / Σ |w| q²`` has
    the least e, by ``(Σ |w| w q)² / Σ |w| q²`` below that of s = 0. The best grid wins, and w is rounded once more with
    its s. So no block has a larger e than its range's own grid gives it.

    Args:
        weight: [rows, cols], in any float dtype; it is rounded as float32.
        bits: 4 or 8.
        block_size: values that share a scale; a power of two.
        symmetric: no zero points, zero is the middle code.
        rotated: values are about normally distributed, without the few large ones: the plain squared error counts.
        narrow: scales have 8 bits themselves: a row's are multiples of its largest one's 127th.
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
        work = buffers[:, :, : tile.stop - start]
        _turn(blocks[tile], out=work[0], spare=work[1])
        scales[tile], zeros[tile] = _encode(work, bits, symmetric, rotated)
        if not narrow:
            qweight[tile] = _packed(work[2], zeros[tile], bits).T
    steps = None
    if narrow:
        scales, steps = _narrowed(scales.reshape(rows, -1))
        true = (scales * steps).reshape(-1)
        for start in range(0, count, step):
            tile = slice(start, min(start + step, count))
            work = buffers[:, :, : tile.stop - start]
            _turn(blocks[tile], out=work[0], spare=work[1])
            work[0] /= true[tile]
            _round(work[0], np.float32(1), zeros[tile], np.float32((1 << bits) - 1), work[2])
            qweight[tile] = _packed(work[2], zeros[tile], bits).T
    zero_points = None if symmetric else pack(zeros.reshape(rows, -1).astype(np.uint8), bits)
    return QuantizedBlocks(qweight.reshape(shapes.qweight), scales.reshape(shapes.scales), zero_points, steps)


def _narrowed(scales: Array) -> tuple[Array, Array]:
    """Scales ``[rows, n]`` as int8, none of them 0, and the steps ``[rows, 1]`` that they count."""
    steps = np.abs(scales).max(axis=1, keepdims=True) / np.float32(127)
    np.maximum(steps, np.finfo(np.float32).tiny, out=steps)
    counts = np.rint(scales / steps)
    np.copyto(counts, np.copysign(np.float32(1), scales), where=counts == 0)
    return np.clip(counts, -127, 127).astype(np.int8), steps


def _turn(blocks: Array, out: Array, spare: Array) -> None:
    """``blocks [n, block_size]`` as columns of ``out``, float32 [block_size, n] like ``spare``, which is spoilt."""
    if blocks.dtype == ml_dtypes.bfloat16 and sys.byteorder == "little":
        # values are turned in pairs, half as many, and are the upper halves of the same float32
        pairs, bits = spare.view(np.uint32)[: len(out) // 2], out.view(np.uint32)
        pairs[...] = blocks.view(np.uint32).T
        np.left_shift(pairs, np.uint32(16), out=bits[0::2])
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=bits[1::2])
    else:
        out[...] = blocks.astype(np.float32, copy=False).T


def _encode(work: Array, bits: int, symmetric: bool, rotated: bool) -> tuple[Array, Any]:
    """Scales [blocks] and zero points (alike, or one for all) of the first of four arrays [block_size, blocks].

    The third then holds steps, which are codes without the zero point; the others are spoilt.
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
    x /= scales  # from here on in steps, so that no sum leaves float32's range
    first = bottom / scales

    def zero_points(factor: np.float32) -> Any:
        if symmetric:
            return np.float32(1 << (bits - 1))
        # what a finer grid cuts off, it cuts off at both ends
        nearest: Array = np.rint(levels * (1 - factor) / 2 - first * factor)
        return np.clip(nearest, 0, levels, out=nearest)

    zeros = zero_points(np.float32(1))
    if bits == 4:
        if rotated:
            magnitudes[...] = 1
        else:
            np.abs(x, out=magnitudes)
        gain, ratio = np.zeros_like(scales), np.ones_like(scales)  # of the best so far; blocks of zeros have no gain
        for factor in map(np.float32, ROTATED_FACTORS if rotated else FACTORS):
            these = zero_points(factor)
            _round(x, factor, these, levels, steps)
            np.multiply(magnitudes, steps, out=products)  # its sign is that of x and of the steps, and cancels
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
    _round(x, np.float32(1), zeros, levels, steps)
    return scales, zeros


def _round(x: Array, factor: np.float32, zeros: Any, levels: np.float32, out: Array) -> None:
    """The whole steps next to ``factor · x``, as far as there are codes around ``zeros``."""
    if factor == 1:
        np.rint(x, out=out)
    else:
        np.multiply(x, factor, out=out)
        np.rint(out, out=out)
    if zeros.ndim:  # clip is the faster one with numbers, and the slower one with arrays
        np.maximum(out, -zeros, out=out)
        np.minimum(out, levels - zeros, out=out)
    else:
        np.clip(out, -zeros, levels - zeros, out=out)


def _totals(values: Array) -> Array:
    """Sums [.., blocks] of ``values [.., block_size, blocks]``, which are spoilt and hold the sums.

    Halves are added, in an order that does not hang on how many blocks there are, as numpy's own does.
    """
    while values.shape[-2] > 1:
        half = values.shape[-2] // 2
        np.add(values[..., :half, :], values[..., half:, :], out=values[..., :half, :])
        values = values[..., :half, :]
    total: Array = values[..., 0, :]
    return total


def _packed(steps: Array, zeros: Array, bits: int) -> Array:
    """Codes of ``steps [block_size, blocks]``, which are spoilt: uint8 [block_size · bits / 8, blocks]."""
    if bits == 8:
        steps += zeros
        return steps.astype(np.uint8)
    # in float32 still: two codes are a whole number below 256
    pairs = steps[1::2]
    pairs *= 16
    pairs += steps[0::2]
    pairs += 17 * zeros
    return pairs.astype(np.uint8)


def dequantize_blocks(blocks: QuantizedBlocks, cols: int, bits: int) -> Array:
    """The float32 [rows, cols] that the codes stand for."""
    codes = unpack(blocks.qweight, bits).astype(np.float32)  # [rows, n, block_size]
    rows, n, block_size = codes.shape
    if blocks.zero_points is None:
        codes -= 1 << (bits - 1)
    else:
        codes -= unpack(blocks.zero_points, bits)[:, :n, None]
    codes *= blocks.true_scales[:, :, None]
    return codes.reshape(rows, n * block_size)[:, :cols]


def pack(codes: Array, bits: int) -> Array:
    """Codes as bytes: two 4-bit ones that follow each other in one, the earlier in its lower half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """The codes in bytes, along the last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
