"""8-bit weights with one scale per output channel (row of the checkpoint's [out, in] matrix)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ZERO_POINT = 128
"""Zero point of unsigned codes, which are -127 … 127 shifted to 1 … 255."""


def quantize_rows(weight: Array) -> tuple[Array, Array]:
    """Rounds each row of a matrix to ``scale · code`` with ``scale = max|row| / 127``.

    Args:
        weight: matrix, float32 [rows, cols]; it is overwritten.

    Returns:
        Codes, int8 [rows, cols], -127 … 127, and scales, float32 [rows], which are 1 for rows of zeros.
    """
    scales = np.maximum(weight.max(axis=1), -weight.min(axis=1)) / np.float32(127)
    scales[scales == 0] = 1
    np.divide(weight, scales[:, None], out=weight)
    np.rint(weight, out=weight)
    # max|row| / scale can round to just above 127
    np.clip(weight, -127, 127, out=weight)
    return weight.astype(np.int8), scales


def unsigned(codes: Array) -> Array:
    """Converts signed int8 codes to unsigned uint8 codes, which are larger by `ZERO_POINT`."""
    shifted: Array = codes.view(np.uint8) ^ np.uint8(ZERO_POINT)
    return shifted


def dequantize_rows(codes: Array, scales: Array, zero_point: int = 0) -> Array:
    """The matrix that codes with a scale per row represent, float32 [rows, cols]."""
    values: Array = (codes.astype(np.float32) - np.float32(zero_point)) * scales[:, None]
    return values
