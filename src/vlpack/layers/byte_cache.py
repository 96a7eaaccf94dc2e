"""A key-value cache of 8 bits on the CPU: a quarter of fp32's bytes to read for every token.

onnxruntime's GroupQueryAttention reads keys and values of int8, ``code · scale[head, channel]``, with scales that the
graph must know beforehand. Nothing is calibrated here, so they come from what is certain:

- *Keys* have been through an RMS norm, so no channel leaves ``sqrt(D) · |weight|``; the rotation mixes two channels,
  of which the larger weight counts. What rounding leaves of the 15 channels with the largest bounds, which would be
  most of the error, is kept in 8 more bits beside them, and ``q`` has the same channels twice.
- *Values* have no bound. Each head of each token is divided by its own power of two, ``2^e``, which the attention
  itself multiplies back: one more channel of the key is ``e``, so that ``q · k`` grows by ``e · ln 2`` and the token's
  weight by ``2^e``, and eight of the value are ``2^-e``, whose weighted mean is what the softmax's sum has grown by.
  With weights p: ``(Σ p 2^e (v / 2^e)) / (Σ p 2^e 2^-e) = Σ p v / Σ p``, the attention over the values as they were.

Both are integers that int8 holds exactly: e itself, and 2^-e as one power of two in that of eight channels whose scale
is near. Reading int8 is slow where many tokens are new, so prompts dequantize the cache and attend in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops
from vlpack.layers.attention import CacheLengths, MakeAttend, Past, cache_lengths

EXTRA = 16
"""More channels of a head; the kernel is slow where they are no multiple of 16. In a key the first is the exponent and
the others are what rounding left of as many channels; in a value the first eight are the exponent's."""
CHANNELS, OCTAVES = 8, 7
LOWEST = -CHANNELS * OCTAVES // 2
"""The exponents are ``LOWEST … LOWEST + 55``: values from 4e-9 to 1e8."""


def tables() -> tuple[np.ndarray, np.ndarray]:
    """What stands for an exponent in key and value, fp32 ``[56, 2 · EXTRA]``, and the value's scales ``[EXTRA]``.

    Row ``i`` is of the exponent ``e = LOWEST + i``: e and zeros, then ``2^-e`` in one of eight channels and zeros.
    """
    beside = np.zeros((CHANNELS * OCTAVES, 2 * EXTRA), np.float32)
    scales = np.ones(EXTRA, np.float32)
    for index in range(len(beside)):
        exponent, channel = LOWEST + index, index // OCTAVES
        beside[index, 0] = exponent
        beside[index, EXTRA + channel] = 2.0**-exponent
        # the codes of a channel's seven exponents are 64, 32 … 1
        scales[channel] = 2.0 ** -(LOWEST + channel * OCTAVES + OCTAVES - 1)
    return beside, scales


class ByteCache(NamedTuple):
    """Attention over the 8-bit cache; see the module."""

    lengths: CacheLengths
    decoding: ir.Value  # bool scalar: there is one new token
    start: ir.Value  # int64 [1]: how many tokens the cache has
    scaling: float  # what cosine and sine are multiplied by

    def __call__(
        self,
        op: OpBuilder,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        past: Past,
        heads: int,
        kv_heads: int,
        key_weight: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `vlpack.layers.attention.Attend`; the cache is int8 ``[B, kv_heads, P, D + EXTRA]``."""
        batch, _, _, wide = ops.shape_of(past[0])
        assert isinstance(wide, int), "the cache's head size is known"
        assert key_weight is not None, "an 8-bit cache is for keys that are normalized"
        size = wide - EXTRA
        beside, value_scales = tables()
        k4, v4 = (op.Reshape(x, [0, 0, kv_heads, size]) for x in (k, v))  # [B, S, kv_heads, D]
        exponent = op.Ceil(op.Mul(op.Log(op.ReduceMax(op.Abs(v4), [-1], keepdims=0)), 1 / math.log(2)))
        index = op.Cast(op.Sub(op.Clip(exponent, float(LOWEST), float(LOWEST + len(beside) - 1)), LOWEST), to=ops.INT64)
        rows = op.Gather(ops.constant(op, beside), index, axis=0)
        key_rows, value_rows = op.Split(rows, [EXTRA, EXTRA], axis=-1, _outputs=2)  # [B, S, kv_heads, EXTRA]
        step, extra_step, pick = _key_scales(op, key_weight, size, self.scaling)
        coarse = op.Mul(op.Round(op.Div(k4, step)), step)
        key = op.Concat(coarse, op.Add(op.MatMul(op.Sub(k4, coarse), pick), key_rows), axis=-1)
        value = op.Concat(op.Mul(v4, op.ReduceSum(value_rows, [-1], keepdims=1)), value_rows, axis=-1)
        value_step = ops.constant(op, np.concatenate([np.full(size, 1 / 127, np.float32), value_scales]))
        scales = op.Concat(step, extra_step, axis=0), value_step

        def one_token(op: OpBuilder) -> list[ir.Value]:
            # with the keys' e · ln 2 the kernel multiplies a token's weight by 2^e
            octave = np.eye(1, EXTRA, dtype=np.float32)[0] * math.log(2) * size**0.5
            q4 = op.Reshape(q, [0, 0, heads, size])
            query = op.Concat(q4, op.Add(op.MatMul(q4, pick), ops.constant(op, octave)), axis=-1)
            q3 = op.Reshape(query, [0, 0, heads * wide])
            k3, v3 = (op.Reshape(x, [0, 0, kv_heads * wide]) for x in (key, value))
            per_head = [op.Expand(scale, [kv_heads, wide]) for scale in scales]
            y, *present = ops.byte_attention(op, q3, k3, v3, past, self.lengths, heads, kv_heads, per_head, size**-0.5)
            parts = [size, CHANNELS, EXTRA - CHANNELS]
            y, sums, _ = op.Split(op.Reshape(y, [0, 0, heads, wide]), parts, axis=-1, _outputs=3)
            y = op.Div(y, op.ReduceSum(sums, [-1], keepdims=1))
            return [op.Reshape(y, [0, 0, heads * size]), *present]

        def more_tokens(op: OpBuilder) -> list[ir.Value]:
            earlier = [op.Cast(op.Slice(x, [0], self.start, [2]), to=ops.FLOAT) for x in past]
            keys, extra = op.Split(earlier[0], [size, EXTRA], axis=-1, _outputs=2)  # [B, kv_heads, P, ..]
            left = op.MatMul(op.Mul(extra, extra_step), op.Transpose(pick, perm=[1, 0]))
            keys = op.Add(op.Mul(keys, step), left)
            values, _ = op.Split(earlier[1], [size, EXTRA], axis=-1, _outputs=2)
            exponents = op.Slice(extra, [0], [1], [3])
            values = op.Mul(values, op.Mul(op.Pow(2.0, exponents), 1 / 127))
            shape = [batch, kv_heads, "past", size]
            cache = ops.typed(keys, ops.FLOAT, shape), ops.typed(values, ops.FLOAT, shape)
            y, _, _ = ops.group_query_attention(op, q, k, v, cache, self.lengths, heads, kv_heads)
            return [y, *(self._written(op, *args) for args in zip(past, (key, value), scales, strict=True))]

        branches = {"then_branch": _branch(op, one_token), "else_branch": _branch(op, more_tokens)}
        y, *present = op.If(self.decoding, **branches, _outputs=3)
        for one in present:
            ops.typed(one, ir.DataType.INT8, [batch, kv_heads, "total_sequence_length", wide])
        return ops.typed(y, ops.dtype_of(q), ops.shape_of(q)), present[0], present[1]

    def _written(self, op: OpBuilder, cache: ir.Value, new: ir.Value, scale: ir.Value) -> ir.Value:
        """The cache with ``new [B, S, kv_heads, D + EXTRA]`` at its end, in codes."""
        # QuantizeLinear is slow where it has scales of its own for the last dimension
        rounded = op.QuantizeLinear(op.Div(new, scale), 1.0, output_dtype=ir.DataType.INT8)
        codes = op.Transpose(rounded, perm=[0, 2, 1, 3])
        missing = op.Sub(op.Cast(self.lengths.total, to=ops.INT64), op.Shape(cache, start=2, end=3))
        room = op.Concat([0] * 6, op.Max(missing, 0), [0], axis=0)  # none where the runtime has allotted it
        at = op.Expand(self.start, op.Shape(new, start=0, end=1))
        return op.TensorScatter(op.Pad(cache, room), codes, at, axis=2)


def _branch(op: OpBuilder, trace: Callable[[OpBuilder], list[ir.Value]]) -> ir.Graph:
    """The graph of three outputs that ``trace`` writes; its name is in all of its values', which must be unique."""

    def scoped(op: OpBuilder) -> list[ir.Value]:
        op.builder.push_module(trace.__name__)
        outputs = trace(op)
        op.builder.pop_module()
        return outputs

    return op.builder.subgraph(scoped, [], [ir.Value(name="") for _ in range(3)], name=trace.__name__)


def _key_scales(op: OpBuilder, weight: ir.Value, size: int, scaling: float) -> tuple[ir.Value, ir.Value, ir.Value]:
    """For keys that were normalized, weighed by ``weight [D]`` and rotated; onnxruntime computes this once, at loading.

    Returns:
        a channel's step ``[D]``; those of the extra channels ``[EXTRA]``; and a matrix ``[D, EXTRA]`` of ones and zeros
        that picks the channels which have a second one: the first column is zeros.
    """
    halves = op.Reshape(op.Abs(weight), [2, size // 2])
    larger = op.ReduceMax(halves, [0], keepdims=0)
    half = op.Add(op.Mul(larger, scaling * size**0.5 / 127), 1e-20)  # a channel of weight 0 has codes of 0
    step = op.Concat(half, half, axis=0)
    _, places = op.TopK(step, [min(EXTRA - 1, size)], _outputs=2)
    chosen = op.Equal(op.Unsqueeze(op.Range(0, size, 1), [1]), places)  # [D, EXTRA - 1]
    pick = op.Pad(op.Cast(chosen, to=ops.FLOAT), [0, 1, 0, EXTRA - 1 - min(EXTRA - 1, size)])
    # a rounding error is at most half a step, and the exponent is an integer
    extra = op.Div(op.MatMul(op.Unsqueeze(step, [0]), pick), 254.0)
    least = np.array([1.0] + [1e-20] * (EXTRA - 1), np.float32)  # the exponent's, and what is divided by
    return step, op.Max(op.Squeeze(extra, [0]), ops.constant(op, least)), pick


def byte_cache(scaling: float) -> MakeAttend:
    """Makes the attention over 8-bit caches; ``scaling`` is of the rotary tables."""

    def make(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value) -> ByteCache:
        lengths = cache_lengths(op, attention_mask)
        new = op.Shape(position_ids, start=-1)
        start = op.Sub(op.Reshape(op.Cast(lengths.total, to=ops.INT64), [1]), new)
        return ByteCache(lengths, op.Squeeze(op.Equal(new, 1)), start, scaling)

    return make
