"""4- and 8-bit weights in blocks along the input dimension: the layout of ORT's MatMulNBits.

For a matrix [rows, cols] and blocks of ``block_size`` there are ``n = ceil(cols / block_size)`` blocks per row; the
last is padded with zeros. ``qweight`` is uint8 [rows, n, block_size · bits / 8], the earlier of two 4-bit codes in the
lower half of its byte; ``scales`` [rows, n]; ``zero_points``, where the blocks are asymmetric, uint8
[rows, ceil(n · bits / 8)] packed the same way. Without zero points the code for zero is ``2 ** (bits - 1)``.
"""

from __future__ import annotations

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


def quantize_blocks(weight: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedBlocks:
    """Round each block to ``scale · (code - zero_point)``, to the nearest code.

    Symmetric 4-bit blocks take their scale from the value of largest magnitude, with its sign, so that it falls on the
    code -8: the grid then has 16 levels and not 15. 8-bit blocks use ±127.

    Args:
        weight: float32 [rows, cols].
        bits: 4 or 8.
        block_size: values that share a scale; even.
        symmetric: no zero points, zero is the middle code.
    """
    rows, cols = weight.shape
    n = -(-cols // block_size)
    if n * block_size != cols:
        weight = np.pad(weight, ((0, 0), (0, n * block_size - cols)))
    blocks = weight.reshape(rows, n, block_size)
    middle = 1 << (bits - 1)
    top, bottom = blocks.max(axis=2), blocks.min(axis=2)  # [rows, n]
    zero_points = None
    if symmetric:
        if bits == 4:
            scales = np.where(top > -bottom, top, bottom) / np.float32(-middle)
        else:
            scales = np.maximum(top, -bottom) / np.float32(middle - 1)
        scales[scales == 0] = 1
        offset: Array | float = np.float32(middle)
    else:
        # the range must hold zero, so that padding and true zeros stay exact
        top, bottom = np.maximum(top, 0), np.minimum(bottom, 0)
        scales = (top - bottom) / np.float32((1 << bits) - 1)
        scales[scales == 0] = 1
        zeros = np.clip(np.rint(-bottom / scales), 0, (1 << bits) - 1)
        zero_points = _pack(zeros.astype(np.uint8), bits)
        offset = zeros[:, :, None]
    codes = blocks / scales[:, :, None]
    codes += offset
    np.rint(codes, out=codes)
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    return QuantizedBlocks(_pack(codes.astype(np.uint8), bits), scales, zero_points)


def dequantize_blocks(blocks: QuantizedBlocks, cols: int, bits: int) -> Array:
    """The float32 [rows, cols] that the codes stand for."""
    codes = _unpack(blocks.qweight, bits).astype(np.float32)  # [rows, n, block_size]
    rows, n, block_size = codes.shape
    if blocks.zero_points is None:
        codes -= 1 << (bits - 1)
    else:
        codes -= _unpack(blocks.zero_points, bits)[:, :n, None]
    codes *= blocks.scales.astype(np.float32)[:, :, None]
    return codes.reshape(rows, n * block_size)[:, :cols]


def _pack(codes: Array, bits: int) -> Array:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def _unpack(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
