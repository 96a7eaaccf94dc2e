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
PANEL = 256
"""Columns of H that are factored at a time."""
BLOCK, INNER = 128, 16
"""Columns that are told of the errors of all rounded ones at once, of those of the same block, and then one by one."""
ROWS = 128
"""Of a matrix, that such columns are worked on at a time."""


class Inputs(NamedTuple):
    """What a matrix's inputs say about rounding it.

    Args:
        order: int64 ``[cols]``, the columns from the last that is rounded to the first.
        lower: float32 ``[cols, cols]``, lower triangular: ``lower lowerᵀ`` is H in that order, damped.
    """

    order: Array
    lower: Array


def describe_inputs(hessian: Array) -> Inputs:
    """The order and the factor that ``hessian`` asks for.

    Args:
        hessian: float32 ``[cols, cols]``, ``Σ xᵀx`` over inputs, finite.
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
        except np.linalg.LinAlgError:  # of so uneven inputs that fp32 cannot tell the smallest from zero
            damping *= 10
    return Inputs(order, lower)


def _factor(matrix: Array) -> None:
    """Replace a positive definite matrix by its lower Cholesky factor, panel by panel from the left.

    A panel is told of all columns before it in one product, which is three times as fast as numpy's own factor of a
    large matrix.

    Raises:
        LinAlgError: it is not positive definite.
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


def fit_blocks(weight: Array, nearest: QuantizedBlocks, inputs: Inputs, bits: int, block_size: int) -> QuantizedBlocks:
    """Codes of ``weight`` that lose least of its products with such ``inputs``, on the grids of the nearest ones.

    Args:
        weight: floats ``[rows, cols]``.
        nearest: what rounding to the nearest makes of it.
        inputs: of the matrix.
        bits: 4 or 8.
        block_size: values that share a scale; a power of two.
    """
    grid = np.ascontiguousarray(nearest.true_scales.T)  # [n, rows]
    grid[grid == 0] = 1  # float16 has none that are smaller
    if nearest.zero_points is None:
        zeros = np.full_like(grid, 1 << (bits - 1))
    else:
        zeros = np.ascontiguousarray(unpack(nearest.zero_points, bits)[:, : len(grid)].T, np.float32)
    # [n · block_size, rows], from a zero point on; padding keeps it
    steps = np.zeros((len(grid) * block_size, weight.shape[0]), np.int16)
    _round_columns(weight, inputs, grid, -zeros, (1 << bits) - 1 - zeros, block_size, steps)
    codes = steps.reshape(len(grid), block_size, -1) + zeros[:, None].astype(np.int16)
    codes = np.ascontiguousarray(codes.reshape(steps.shape).T.astype(np.uint8))
    return nearest._replace(qweight=pack(codes, bits).reshape(nearest.qweight.shape))


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
    codes = np.empty((cols, rows), np.int8)
    most = np.full((1, rows), 127, np.float32)
    _round_columns(weight, inputs, scales[None], -most, most, cols, codes)
    return np.ascontiguousarray(codes.T)


def _round_columns(
    weight: Array, inputs: Inputs, grid: Array, least: Array, most: Array, block_size: int, steps: Array
) -> None:
    """Fill ``steps [cols, rows]``: how many of its block's grid steps each weight ``[rows, cols]`` becomes.

    A column aims at its weights less what the columns before it have lost, as far as its inputs hang together with
    theirs: with ``H = U D Uᵀ`` and a unit upper triangular U, errors δ cost ``Σ_k D_k ((δ U)_k)²``, and the k-th column
    chooses the k-th term. U's columns are those of ``inputs.lower``, divided by its diagonal and turned around.

    Args:
        weight: floats.
        inputs: of the matrix.
        grid: float32 ``[blocks, rows]``, the size of a step.
        least: of the steps, ``[blocks, rows]``.
        most: of the steps, ``[blocks, rows]``.
        block_size: columns of a block.
        steps: whole numbers.
    """
    rows, cols = weight.shape
    order, lower = inputs
    # weights, and the errors of those that are rounded
    lost = np.ascontiguousarray(weight.T[order], np.float32)
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
                # BLAS would wake its threads for all rows at once, and wait for them
                for row in range(0, rows, ROWS):
                    some = slice(row, row + ROWS)
                    aims[first - start : last - start, some] -= near @ lost[last:stop, some]
            for col in range(last - 1, first - 1, -1):
                aim = aims[col - start]
                if col + 1 < last:
                    aim -= np.einsum(
                        "i,ij->j", shares[col + 1 - start : last - start, col - start], lost[col + 1 : last]
                    )
                block = order[col] // block_size
                np.divide(aim, grid[block], out=code)
                np.rint(code, out=code)
                np.maximum(code, least[block], out=code)
                np.minimum(code, most[block], out=code)
                steps[order[col]] = code
                code *= grid[block]
                np.subtract(code, lost[col], out=lost[col])
