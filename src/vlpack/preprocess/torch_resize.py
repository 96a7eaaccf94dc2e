"""Resizes uint8 images exactly as torch's antialiased resize does, which transformers' video processors use.

Pillow uses the same filters with finer weights, so that some of its levels differ by one. The image processor in
`vlpack.preprocess.images` uses Pillow, because transformers' image processor does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

_BLOCK = 64  # outputs per matrix product; one product for all outputs would multiply mostly zeros


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x, a = np.abs(x), -0.5  # torch's antialiased resize uses Pillow's a, not the -0.75 of its plain bicubic
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights: npt.NDArray[np.float64] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.maximum(1 - np.abs(x), 0.0)
    return weights


class _Filter(NamedTuple):
    weight: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
    reach: float  # distance beyond which the weight is zero, in pixels of the larger scale


_FILTERS = {Image.Resampling.BICUBIC: _Filter(_bicubic, 2.0), Image.Resampling.BILINEAR: _Filter(_bilinear, 1.0)}

FILTERS = tuple(int(number) for number in _FILTERS)
"""The filters that `resize_frame` supports, as `PIL.Image.Resampling` numbers."""


def resize_frame(
    frame: npt.NDArray[np.uint8], height: int, width: int, resample: int = Image.Resampling.BICUBIC
) -> npt.NDArray[np.uint8]:
    """Resizes a frame.

    The result equals ``torch.nn.functional.interpolate(…, antialias=True)`` on uint8 on a CPU bit for bit, which
    transformers/video_processing_utils.py calls through torchvision's ``resize``: first along the width, then along
    the height, each time with weights rounded to 16 bits and results rounded to uint8. Source of the arithmetic:
    ``_compute_index_ranges_int16_weights`` in ATen.

    Args:
        frame: uint8 [H, W, C].
        height: height of the result in pixels, at least 1.
        width: width of the result in pixels, at least 1.
        resample: filter, one of `FILTERS`.

    Returns:
        uint8 [height, width, C].
    """
    rows, columns, channels = frame.shape
    lines = np.ascontiguousarray(frame.transpose(0, 2, 1)).reshape(rows * channels, columns)  # [H*C, W]
    if width != columns:
        lines = _resize_rows(lines, width, resample)
    lines = lines.reshape(rows, channels * width)
    if height != rows:
        lines = _resize_rows(np.ascontiguousarray(lines.T), height, resample).T
    return np.ascontiguousarray(lines.reshape(height, channels, width).transpose(0, 2, 1))


class _Block(NamedTuple):
    start: int  # first input that the block's outputs depend on
    weights: npt.NDArray[np.float64]  # [inputs, outputs], integers stored as float64


def _resize_rows(lines: npt.NDArray[np.uint8], size: int, resample: int) -> npt.NDArray[np.uint8]:
    """Resizes each row: uint8 [N, inputs] becomes uint8 [N, size]."""
    blocks, bits = _weights(lines.shape[1], size, resample)
    out = np.empty((len(lines), size), np.uint8)
    place = 0
    for start, weights in blocks:
        # integers below 2**53: the sums are exact in float64, whose matrix products are fast
        sums = lines[:, start : start + len(weights)].astype(np.float64) @ weights
        levels = np.floor((sums + 2.0 ** (bits - 1)) * 2.0**-bits)
        out[:, place : place + weights.shape[1]] = np.clip(levels, 0, 255)
        place += weights.shape[1]
    return out


@functools.lru_cache(maxsize=16)
def _weights(inputs: int, outputs: int, resample: int) -> tuple[list[_Block], int]:
    """The filter's weights as integers, in blocks of outputs, and the number of bits by which they were scaled."""
    kind = _FILTERS[Image.Resampling(resample)]
    scale = inputs / outputs
    reach, squeeze = kind.reach * max(scale, 1.0), 1 / max(scale, 1.0)
    centers = scale * (np.arange(outputs) + 0.5)
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), inputs)
    taps = np.arange(int((last - first).max()))
    weights = kind.weight((taps + first[:, None] - centers[:, None] + 0.5) * squeeze)  # [outputs, taps]
    weights[taps >= (last - first)[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = _bits(float(weights.max()))
    scaled = weights * 2.0**bits
    whole = np.trunc(scaled + np.copysign(0.5, scaled))
    blocks = []
    for place in range(0, outputs, _BLOCK):
        part = slice(place, min(place + _BLOCK, outputs))
        start, end = int(first[part].min()), int(last[part].max())
        matrix = np.zeros((end - start, part.stop - part.start))
        inside = taps < (last - first)[part, None]
        where = np.where(inside, taps + first[part, None] - start, 0)
        np.add.at(matrix.T, (np.arange(matrix.shape[1])[:, None], where), np.where(inside, whole[part], 0))
        blocks.append(_Block(start, matrix))
    return blocks, bits


def _bits(largest: float) -> int:
    """Number of bits by which weights are shifted so that the largest one just fits into a signed 16-bit integer."""
    for bits in range(22):
        if math.floor(0.5 + largest * (1 << (bits + 1))) >= 1 << 15:
            return bits
    return 22
