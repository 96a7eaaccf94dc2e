"""8-bit weights with one scale per output channel (row of the checkpoint's [out, in] matrix)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ZERO_POINT = 128
"""Of unsigned codes: -127 … 127 becomes 1 … 255."""


def quantize_rows(weight: Array) -> tuple[Array, Array]:
    """Round each row to ``scale · code`` with ``scale = max|row| / 127``.

    Args:
        weight: float32 [rows, cols]; used as scratch space.

    Returns:
        codes int8 [rows, cols], -127 … 127; scales float32 [rows], 1 for a row of zeros.
    """
    scales = np.maximum(weight.max(axis=1), -weight.min(axis=1)) / np.float32(127)
    scales[scales == 0] = 1
    np.divide(weight, scales[:, None], out=weight)
    np.rint(weight, out=weight)
    # max|row| / scale can round to just above 127
    np.clip(weight, -127, 127, out=weight)
    return weight.astype(np.int8), scales


def unsigned(codes: Array) -> Array:
    """Codes as uint8 around `ZERO_POINT`."""
    shifted: Array = codes.view(np.uint8) ^ np.uint8(ZERO_POINT)
    return shifted


def dequantize_rows(codes: Array, scales: Array, zero_point: int = 0) -> Array:
    """The float32 [rows, cols] that the codes stand for."""
    values: Array = (codes.astype(np.float32) - np.float32(zero_point)) * scales[:, None]
    return values
