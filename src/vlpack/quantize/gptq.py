"""4-bit weights in blocks, rounded for the inputs that they meet: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Rounding to the nearest code makes every weight's own error small. What matters is the error of ``x Wᵀ``, whose square
over many inputs is ``Σ δ H δᵀ`` for a row's errors δ, with ``H = Σ xᵀx``. So columns are rounded one after the other,
those of the largest inputs first, and what each rounding leaves is made up for by the columns that are still to come.
The grids (scales and zero points) are those of rounding to the nearest, so that the layout and the kernels are the
same. Rows do not hang on each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.quantize.blocks import QuantizedBlocks, pack, unpack

Array = npt.NDArray[Any]

DAMPING = 0.2
"""Added to H's diagonal, of its mean: a few thousand inputs say little of some directions. On held-out inputs it leaves
7 to 8% less error than the paper's 0.01 (docs/results.md)."""
BLOCK, INNER = 128, 16
"""Columns after which the later ones are told of the errors, all of them or those of the block."""


class Inputs(NamedTuple):
    """What a matrix's inputs say about rounding it.

    Args:
        order: int64 ``[cols]``, in which columns are rounded.
        upper: float32 ``[cols, cols]``, upper triangular: ``upperᵀ upper`` is the inverse of H in that order, damped.
    """

    order: Array
    upper: Array


def describe_inputs(hessian: Array) -> Inputs:
    """The order and the factor that ``hessian`` asks for.

    Args:
        hessian: float32 ``[cols, cols]``, ``Σ xᵀx`` over inputs, finite.
    """
    diagonal = hessian.diagonal().copy()
    order = np.argsort(-diagonal, kind="stable")
    # H = R Rᵀ with an upper triangular R, of which the factor is the inverse; numpy has lower ones, from behind
    behind = order[::-1]
    damping = DAMPING * float(diagonal.mean(dtype=np.float64)) or 1.0
    while True:
        lower = hessian[np.ix_(behind, behind)]
        np.fill_diagonal(lower, diagonal[behind] + np.float32(damping))
        try:
            _invert_factor(lower)
            break
        except np.linalg.LinAlgError:  # of so uneven inputs that fp32 cannot tell the smallest from zero
            damping *= 10
    return Inputs(order, np.ascontiguousarray(lower[::-1, ::-1]))


def _invert_factor(matrix: Array) -> None:
    """Replace a positive definite matrix by the inverse of its lower Cholesky factor, in products of its quarters.

    ``[[A, Bᵀ], [B, D]]`` has the factor ``[[L, 0], [C, M]]``: L is A's, ``C = B L⁻ᵀ``, M is that of ``D - C Cᵀ``; its
    inverse is ``[[L⁻¹, 0], [-M⁻¹ C L⁻¹, M⁻¹]]``. numpy's own factor of a large matrix takes several times as long.

    Raises:
        LinAlgError: it is not positive definite.
    """
    size = len(matrix)
    if size <= 128:
        matrix[...] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    half = size // 2
    first, second = matrix[:half, :half], matrix[half:, half:]
    _invert_factor(first)
    below = matrix[half:, :half] @ first.T
    second -= below @ below.T
    _invert_factor(second)
    matrix[half:, :half] = -(second @ (below @ first))
    matrix[:half, half:] = 0


def fit_blocks(weight: Array, nearest: QuantizedBlocks, inputs: Inputs, bits: int, block_size: int) -> QuantizedBlocks:
    """Codes of ``weight`` that lose least of its products with such ``inputs``, on the grids of the nearest ones.

    Args:
        weight: floats ``[rows, cols]``.
        nearest: what rounding to the nearest makes of it.
        inputs: of the matrix.
        bits: 4 or 8.
        block_size: values that share a scale; a power of two.
    """
    steps = np.ascontiguousarray(nearest.true_scales.T)  # [n, rows]
    steps[steps == 0] = 1  # float16 has none that are smaller
    if nearest.zero_points is None:
        zeros = np.full_like(steps, 1 << (bits - 1))
    else:
        zeros = np.ascontiguousarray(unpack(nearest.zero_points, bits)[:, : len(steps)].T, np.float32)
    codes = np.repeat(zeros.astype(np.uint8), block_size, axis=0)  # [n · block_size, rows]; padding keeps them
    left = np.ascontiguousarray(weight.T[inputs.order], np.float32)
    _round_columns(left, inputs, steps, zeros, (1 << bits) - 1, block_size, codes)
    return nearest._replace(qweight=pack(np.ascontiguousarray(codes.T), bits).reshape(nearest.qweight.shape))


def fit_rows(weight: Array, scales: Array, inputs: Inputs) -> Array:
    """8-bit codes of ``weight`` with a scale per row that lose least of its products with such ``inputs``.

    Args:
        weight: floats ``[rows, cols]``.
        scales: float32 ``[rows]``, of rounding to the nearest.
        inputs: of the matrix.

    Returns:
        int8 ``[rows, cols]``, -127 … 127.
    """
    rows, cols = weight.shape
    codes = np.empty((cols, rows), np.uint8)
    left = np.ascontiguousarray(weight.T[inputs.order], np.float32)
    _round_columns(left, inputs, scales[None], np.full((1, rows), 127, np.float32), 254, cols, codes)
    signed: Array = (codes.T.astype(np.int16) - 127).astype(np.int8)
    return signed


def _round_columns(
    left: Array, inputs: Inputs, steps: Array, zeros: Array, levels: int, block_size: int, codes: Array
) -> None:
    """Fill ``codes [cols, rows]``; the weights ``left [cols, rows]``, in the inputs' order, are spoilt."""
    cols, rows = left.shape
    order, upper = inputs
    errors = np.empty((BLOCK, rows), np.float32)
    code = np.empty(rows, np.float32)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            for col in range(first, last):
                block = order[col] // block_size
                step, zero, error = steps[block], zeros[block], errors[col - start]
                np.divide(left[col], step, out=code)
                np.rint(code, out=code)
                code += zero
                np.clip(code, 0, levels, out=code)
                codes[order[col]] = code
                code -= zero
                code *= step
                np.subtract(left[col], code, out=error)
                error /= upper[col, col]
                left[col + 1 : last] -= upper[col, col + 1 : last, None] * error
            left[last:stop] -= upper[first:last, last:stop].T @ errors[first - start : last - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors[: stop - start]
