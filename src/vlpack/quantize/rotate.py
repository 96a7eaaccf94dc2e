"""Rotation and balance of a matrix's input channels, which make weights and activations easier to quantize.

The product ``y = x Wᵀ`` does not change if ``x`` becomes ``x S R`` and ``W`` becomes ``W S⁻¹ R``, for a diagonal ``S``
and an orthogonal ``R``. *Balance* chooses ``S`` so that no channel is much larger than the others; ``S`` is merged into
the weight that computes ``x`` (that of a norm, or the rows of the matrix before). *Rotation* mixes blocks of channels
by a Hadamard matrix, which spreads the remaining outliers over their blocks and makes values nearly normally
distributed.

Sources: QuaRot (arXiv:2404.00456) and QuIP# (arXiv:2402.04396) for the rotation, SmoothQuant (arXiv:2211.10438) for
moving scales from activations into weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LARGEST = 1024.0
"""Largest factor by which balance multiplies or divides a channel."""


def _is_paley(order: int) -> bool:
    """Whether Paley's first construction gives a Hadamard matrix of ``order``: ``order - 1`` is a prime, 3 modulo 4."""
    prime = order - 1
    return prime % 4 == 3 and all(prime % divisor for divisor in range(2, int(prime**0.5) + 1))


def _core(order: int) -> int | None:
    """The order of the matrix that is doubled to make a Hadamard matrix of ``order``; None if none is known."""
    while order > 1 and not _is_paley(order):
        if order % 2:
            return None
        order //= 2
    return order if order >= 1 else None


@cache
def hadamard(order: int) -> Array:
    """A Hadamard matrix: float64 ``[order, order]`` of 1 and -1 whose rows are orthogonal.

    It is made by Sylvester's doubling from a single 1, or from a matrix of Paley's first construction (orders 12, 20,
    24, 72 and others), so that one exists for head sizes such as 72 and 80, too.

    Raises:
        ValueError: these constructions give no matrix of this order.
    """
    core = _core(order) if order >= 1 else None
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known")
    matrix = np.ones((1, 1))
    if core > 1:
        prime = core - 1
        squares = {number * number % prime for number in range(1, prime)}
        character = np.array([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
        matrix = np.eye(core)
        matrix[0, 1:], matrix[1:, 0] = 1, -1
        matrix[1:, 1:] += character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.setflags(write=False)
    return matrix


def rotation_size(channels: int, largest: int) -> int:
    """The largest block size up to ``largest`` that divides ``channels`` and has a Hadamard matrix; at least 1."""
    sizes = (size for size in range(min(largest, channels), 0, -1) if channels % size == 0 and _core(size))
    return next(sizes)


def rotation_matrix(size: int) -> Array:
    """The orthogonal ``R [size, size]``, float32, with which a graph multiplies each block of channels: ``x R``."""
    matrix: Array = (hadamard(size) / np.sqrt(size)).astype(np.float32)
    return matrix


ROTATED_TILE = 1 << 16
"""Number of values that `rotate` processes at a time, so that their float64 copies stay in a core's cache."""
PRODUCT = 1 << 17
"""Number of multiplications in one product of `rotate`: so few that BLAS computes them in the calling thread."""


def rotate(rows: Array, size: int, *, back: bool = False) -> Array:
    """Multiplies every block of ``size`` values of ``rows [n, cols]`` by `rotation_matrix`; the result is float32.

    Sums are computed in float64, in which sums of bfloat16 values are exact, so that the result does not depend on the
    order in which a processor's kernels add.

    Args:
        rows: array ``[n, cols]`` in any float dtype.
        size: block size, a divisor of ``cols``; 1 changes nothing.
        back: whether to multiply by the transpose, which undoes a rotation.
    """
    if size == 1:
        return rows.astype(np.float32, copy=False)
    matrix = hadamard(size).T if back else hadamard(size)
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    rotated = np.empty(blocks.shape, np.float32)
    step = max(1, min(len(blocks), ROTATED_TILE // size))
    stack = max(1, PRODUCT // size**2)
    given, product = np.empty((2, step, size))
    for start in range(0, len(blocks), step):
        tile = blocks[start : start + step]
        x, y = given[: len(tile)], product[: len(tile)]
        x[...] = tile
        # a product of many rows would wake BLAS's threads for every tile, while the caller already uses several threads
        whole = len(tile) // stack * stack
        np.matmul(x[:whole].reshape(-1, stack, size), matrix, out=y[:whole].reshape(-1, stack, size))
        np.matmul(x[whole:], matrix, out=y[whole:])
        np.multiply(y, size**-0.5, out=rotated[start : start + step], casting="same_kind")
    return rotated.reshape(rows.shape)


def powers_of_two(scales: Array) -> Array:
    """Positive scales rounded to powers of two, so that multiplying floats by them causes no rounding error."""
    exponents = np.rint(np.log2(scales))
    limit = np.log2(LARGEST)
    rounded: Array = np.exp2(np.clip(exponents, -limit, limit)).astype(np.float32)
    return rounded


def equal_columns(norms: Array) -> Array:
    """Scales of channels that make the columns of the matrices that read them equally large.

    The differences between channels are then in the activations alone, over which rotation spreads them. This is the
    best choice for 8 bits (docs/results.md).

    Args:
        norms: L2 norms ``[channels]`` of the readers' columns.
    """
    return powers_of_two(_relative(norms))


def even_sizes(norms: Array, sizes: Array, tolerance: float) -> Array:
    """Scales that move each disproportionate channel towards equal sizes of its activations and its readers' columns.

    The rounding error of a weight is multiplied by the activations of its channel, so 4-bit weights work best if both
    have similar sizes; but rescaling has a cost, too. A channel whose ratio of readers to activations is within
    ``tolerance`` of the median ratio therefore stays as it is.

    Args:
        norms: L2 norms ``[channels]`` of the readers' columns.
        sizes: sizes of the activations ``[channels]``, or an estimate of them.
        tolerance: largest factor between a channel's ratio and the median that is tolerated; at least 1.
    """
    ratio = _relative(norms) / _relative(sizes)
    ratio /= np.median(ratio)
    return powers_of_two(np.sqrt(ratio / np.clip(ratio, 1 / tolerance, tolerance)))


def _relative(values: Array) -> Array:
    """Values divided by the median of the positive ones; values of zero or close to it become 1."""
    positive = values[values > 0]
    middle = float(np.median(positive)) if positive.size else 1.0
    relative = values.astype(np.float64) / middle
    return np.where(relative > 1e-6, relative, 1.0)
