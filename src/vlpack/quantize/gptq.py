"""GPTQ: weights rounded so that their products with calibration inputs change little (Frantar et al. 2022).

Rounding to the nearest code minimizes every weight's own error. What matters is the error of ``x Wᵀ``: summed over many
inputs its square is ``δ H δᵀ`` for the errors δ of a row, with the Hessian ``H = Σ xᵀx``. Columns are therefore rounded
one after the other, those with the largest inputs first, and the columns that are not rounded yet compensate for the
error of each rounding. The grids (scales and zero points) are those of rounding to the nearest code, so that layout and
kernels are the same. Rows are independent of each other. The method is described in arXiv:2210.17323.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.quantize.blocks import QuantizedBlocks, pack, unpack

Array = npt.NDArray[Any]

DAMPING = 0.2
"""Fraction of the mean of H's diagonal that is added to the diagonal, because a few thousand inputs determine some
directions poorly. On held-out inputs it leaves 7 to 8% less error than the paper's 0.01 (docs/results.md)."""
PANEL = 256
"""Number of columns of H that are factored at a time."""
BLOCK, INNER = 128, 16
"""Numbers of columns to which errors are passed on at a time: those from later blocks to a block of 128 columns, those
within that block to 16 columns, and those within the 16 to a single column."""
STRIP = 64
"""Number of rows of a matrix that are transposed at a time, so that they stay in the cache."""
ROWS = 128
"""Number of rows of a matrix for which errors are passed on to 16 columns at a time."""


class HessianFactor(NamedTuple):
    """The Cholesky factor of a matrix's damped Hessian ``H = Σ xᵀx``, with the order in which columns are rounded.

    Args:
        act_order: int64 ``[cols]``, indices of the columns, from the one that is rounded last to the first one.
        lower: float32 ``[cols, cols]``, lower triangular; ``lower lowerᵀ`` is the damped H with its rows and columns
            in that order.
    """

    act_order: Array
    lower: Array


def factor_hessian(hessian: Array) -> HessianFactor:
    """The order of the columns and the Cholesky factor for a Hessian; damping is raised until the factor exists.

    Args:
        hessian: Hessian ``Σ xᵀx`` over inputs, float32 ``[cols, cols]``, all values finite.
    """
    diagonal = hessian.diagonal().copy()
    order = np.argsort(-diagonal, kind="stable")[::-1]
    damping = DAMPING * float(diagonal.mean(dtype=np.float64)) or 1.0
    lower = np.empty_like(hessian)
    while True:
        for start in range(0, len(order), PANEL):
            rows = hessian[order[start : start + PANEL]]
            np.take(rows, order, axis=1, out=lower[start : start + PANEL], mode="clip")
        np.fill_diagonal(lower, diagonal[order] + np.float32(damping))
        try:
            _factor(lower)
            break
        except np.linalg.LinAlgError:  # inputs so uneven that fp32 cannot tell the smallest from zero
            damping *= 10
    return HessianFactor(order, lower)


def _factor(matrix: Array) -> None:
    """Replaces a positive definite matrix by its lower Cholesky factor, panel by panel from the left.

    One matrix product subtracts the contribution of all earlier columns from a panel, which is three times as fast as
    numpy's own factorization of a large matrix.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    size = len(matrix)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        panel = matrix[start:, start:stop]
        if start:
            panel -= matrix[start:, :start] @ matrix[start:stop, :start].T
        corner = np.linalg.cholesky(panel[: stop - start])
        panel[: stop - start] = corner
        if stop < size:
            panel[stop - start :] = panel[stop - start :] @ np.linalg.inv(corner).T
        matrix[start:stop, stop:] = 0


def gptq_round_blocks(
    weight: Array, nearest: QuantizedBlocks, factor: HessianFactor, bits: int, block_size: int
) -> QuantizedBlocks:
    """Rounds a matrix in blocks by GPTQ, with the scales and zero points that rounding to the nearest code has chosen.

    Args:
        weight: matrix ``[rows, cols]``, in any float dtype.
        nearest: the same matrix rounded to the nearest codes, of which only the grids are used.
        factor: Hessian factor of the matrix's inputs.
        bits: bits per code, 4 or 8.
        block_size: number of values that share a scale; a power of two.
    """
    grid = np.ascontiguousarray(nearest.true_scales.T)  # [n, rows]
    grid[grid == 0] = 1  # scales that float16 has rounded to zero
    if nearest.zero_points is None:
        zeros = np.full_like(grid, 1 << (bits - 1))
    else:
        zeros = np.ascontiguousarray(unpack(nearest.zero_points, bits)[:, : len(grid)].T, np.float32)
    # [n · block_size, rows], counted from the zero point, which is the code of the padding
    steps = np.zeros((len(grid) * block_size, weight.shape[0]), np.int16)
    _round_columns(weight, factor, grid, -zeros, (1 << bits) - 1 - zeros, block_size, steps)
    codes = steps.reshape(len(grid), block_size, -1) + zeros[:, None].astype(np.int16)
    codes = np.ascontiguousarray(codes.reshape(steps.shape).astype(np.uint8).T)
    return nearest._replace(qweight=pack(codes, bits).reshape(nearest.qweight.shape))


def gptq_round_rows(weight: Array, scales: Array, factor: HessianFactor) -> Array:
    """Rounds a matrix to 8-bit codes with one scale per row by GPTQ.

    Args:
        weight: matrix ``[rows, cols]``, in any float dtype.
        scales: scales that rounding to the nearest code has chosen, float32 ``[rows]``.
        factor: Hessian factor of the matrix's inputs.

    Returns:
        Codes, int8 ``[rows, cols]``, -127 … 127.
    """
    rows, cols = weight.shape
    codes = np.empty((cols, rows), np.int8)
    most = np.full((1, rows), 127, np.float32)
    _round_columns(weight, factor, scales[None], -most, most, cols, codes)
    return np.ascontiguousarray(codes.T)


def _round_columns(
    weight: Array, factor: HessianFactor, grid: Array, least: Array, most: Array, block_size: int, steps: Array
) -> None:
    """Fills ``steps [cols, rows]`` with each weight as a whole number of grid steps of its block.

    Before a column is rounded, the errors of the columns rounded earlier are subtracted from its weights, in proportion
    to the correlation of their inputs with its own. This follows from ``H = U D Uᵀ`` with a unit upper triangular U:
    errors δ cost ``Σ_k D_k ((δ U)_k)²``, and rounding the k-th column determines the k-th term. U consists of the
    columns of ``factor.lower``, divided by its diagonal and in reverse order.

    Args:
        weight: matrix ``[rows, cols]``, in any float dtype.
        factor: Hessian factor of the matrix's inputs.
        grid: size of a step, float32 ``[blocks, rows]``.
        least: smallest number of steps, ``[blocks, rows]``.
        most: largest number of steps, ``[blocks, rows]``.
        block_size: number of columns of a block.
        steps: array of an integer dtype, which is filled.
    """
    rows, cols = weight.shape
    act_order, lower = factor
    # weights of the columns that are not rounded yet, and errors of those that are
    lost = np.empty((cols, rows), np.float32)
    for row in range(0, rows, STRIP):
        lost[:, row : row + STRIP] = weight[row : row + STRIP].take(act_order, axis=1).T
    code = np.empty(rows, np.float32)
    for stop in range(cols, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        shares = lower[start:, start:stop] / lower.diagonal()[start:stop]
        aims = lost[start:stop].copy()
        if stop < cols:
            aims -= shares[stop - start :].T @ lost[stop:]
        for last in range(stop, start, -INNER):
            first = max(last - INNER, start)
            if last < stop:
                near = shares[last - start : stop - start, first - start : last - start].T
                # a product of all rows at once would make BLAS wake its threads and wait for them
                for row in range(0, rows, ROWS):
                    some = slice(row, row + ROWS)
                    aims[first - start : last - start, some] -= near @ lost[last:stop, some]
            for col in range(last - 1, first - 1, -1):
                aim = aims[col - start]
                if col + 1 < last:
                    aim -= np.einsum(
                        "i,ij->j", shares[col + 1 - start : last - start, col - start], lost[col + 1 : last]
                    )
                block = act_order[col] // block_size
                np.divide(aim, grid[block], out=code)
                np.rint(code, out=code)
                np.maximum(code, least[block], out=code)
                np.minimum(code, most[block], out=code)
                steps[act_order[col]] = code
                code *= grid[block]
                np.subtract(code, lost[col], out=lost[col])
