"""8-bit weights with one scale per output channel (row of the checkpoint's [out, in] matrix)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ZERO_POINT = 128
"""Codes are unsigned around 128: -127 … 127 becomes 1 … 255."""


def quantize_rows(weight: Array) -> tuple[Array, Array]:
    """Round each row to ``scale · (code - 128)`` with ``scale = max|row| / 127``.

    Args:
        weight: float32 [rows, cols]; used as scratch space.

    Returns:
        codes uint8 [rows, cols], scales float32 [rows]; a row of zeros has scale 1.
    """
    scales = np.maximum(weight.max(axis=1), -weight.min(axis=1)) / np.float32(127)
    scales[scales == 0] = 1
    np.divide(weight, scales[:, None], out=weight)
    np.rint(weight, out=weight)
    # max|row| / scale can round to just above 127
    np.clip(weight, -127, 127, out=weight)
    weight += ZERO_POINT
    return weight.astype(np.uint8), scales


def dequantize_rows(codes: Array, scales: Array, zero_points: Array | int = ZERO_POINT) -> Array:
    """The float32 [rows, cols] that the codes stand for; ``zero_points`` is one number or uint8 [rows]."""
    zeros = np.broadcast_to(np.asarray(zero_points, np.float32), scales.shape)
    values: Array = (codes.astype(np.float32) - zeros[:, None]) * scales[:, None]
    return values
