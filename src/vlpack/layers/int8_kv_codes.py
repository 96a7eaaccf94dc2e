"""What an 8-bit cache holds beside a head's channels, as numbers; `vlpack.layers.int8_kv_cache` says what for."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops

EXTRA = 16
"""More channels of a head; the kernel is slow where they are no multiple of 16. In a key the first is the exponent and
the others are what rounding left of as many channels; in a value the first eight are the exponent's."""
CHANNELS, OCTAVES = 8, 7
LOWEST = -CHANNELS * OCTAVES // 2
"""The exponents are ``LOWEST … LOWEST + 55``: values from 4e-9 to 1e8."""
LESS = 2.0**-40
"""Queries are so much smaller that rounding makes 0 of all of them: what is done to keys does nothing to queries."""
LEFT = 1 / 254
"""A step of what rounding left, in steps: it is at most half of one."""


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Codes for an exponent in key and value, ``[56, 2, EXTRA]``, and what one in a value is worth, ``[EXTRA]``.

    Row ``i`` is of the exponent ``e = LOWEST + i``: e and zeros, then ``2^-e`` in one of eight channels and zeros.
    """
    codes, worth = np.zeros((CHANNELS * OCTAVES, 2, EXTRA)), np.zeros(EXTRA)
    for index in range(len(codes)):
        channel, octave = divmod(index, OCTAVES)
        codes[index, 0, 0] = LOWEST + index
        codes[index, 1, channel] = 2 ** (OCTAVES - 1 - octave)  # 64, 32 … 1
        worth[channel] = 2.0 ** -(LOWEST + channel * OCTAVES + OCTAVES - 1)
    return codes, worth


def by_halves(codes: np.ndarray) -> np.ndarray:
    """The matrix ``[56, ..]`` that turns ``i + 1`` halves and then ones into row ``i`` of ``codes [56, ..]``.

    Row ``i`` is ``codes[0]`` and the steps ``codes[j] - codes[j - 1]`` up to ``i``; ``2 - 2h`` is 1 for a half and 0
    for a one, and what is constant in that goes with the first, always a half. All are integers: the product is exact.
    """
    steps = np.diff(codes, axis=0)
    return np.concatenate([2 * (codes[:1] + 2 * steps.sum(0, keepdims=True)), -2 * steps])


class Constants(NamedTuple):
    """The same for all layers; ``groups`` are as many heads as keys have: the queries', then the keys', the values'.

    A value's channels are in the cache as ``v · 2^(LOWEST - 1 - e)``, which is a product of halves.
    """

    thresholds: ir.Value  # [56]: a value's peak passes 1 + (e - LOWEST) of them
    extra: ir.Value  # [groups, 56, EXTRA]: from a half for each that is passed, and 1 for others
    extra_of_new: ir.Value  # … of keys and values only
    steps: tuple[ir.Value, ir.Value]  # [kv_heads, D + EXTRA]: of a key's codes and of a value's
    steps_of_new: ir.Value  # [2, 1, D + EXTRA]: both
    worth: ir.Value  # [EXTRA, 1]: from the mean of a value's extra channels to what to divide the others' by
    ones: ir.Value  # [D]


def constants(op: OpBuilder, heads: int, kv_heads: int, size: int) -> Constants:
    """For ``heads`` of queries and ``kv_heads`` of keys, with ``size`` channels each."""
    codes, worth = tables()
    of_new = by_halves(codes).transpose(1, 0, 2)  # [2, 56, EXTRA]
    of_queries = np.zeros((heads // kv_heads, *of_new.shape[1:]))
    # with the keys' e · ln 2 the kernel multiplies a token's weight by 2^e
    of_queries[:, 0, 0] = 2 * math.log(2) * size**0.5 * LESS
    least = 2.0 ** (LOWEST - 1)
    steps = np.ones((2, size + EXTRA))
    steps[0, size + 1 :] = LEFT
    steps[1, :size] = least / 127
    key_steps, value_steps = (np.tile(one, (kv_heads, 1)) for one in steps)
    return Constants(
        thresholds=ops.constant(op, [-1.0, *(2.0 ** (LOWEST + i) for i in range(len(codes) - 1))]),
        extra=ops.constant(op, np.concatenate([of_queries, of_new])),
        extra_of_new=ops.constant(op, of_new),
        steps=(ops.constant(op, key_steps), ops.constant(op, value_steps)),
        steps_of_new=ops.constant(op, steps[:, None]),
        worth=ops.constant(op, least * worth[:, None]),
        ones=ops.constant(op, np.ones(size)),
    )
