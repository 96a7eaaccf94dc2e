"""The key/value cache in 8 bits on the CPU: each token reads a quarter of the bytes of an fp32 cache.

onnxruntime's GroupQueryAttention reads int8 keys and values as ``code · scale[head, channel]``, with scales that are
constants of the graph. Nothing is calibrated here, so the scales come from bounds that always hold:

- *Keys* come from an RMS norm, so a channel's magnitude is at most ``sqrt(D) · |weight|``. The rotary embedding mixes
  two channels, and the larger of their weights bounds both: a 127th of that bound is the step of both channels. The
  weight of the keys' norm is divided by the step, so that rounding the keys gives their codes; the weight of the
  queries' norm is multiplied by the step. The rounding remainders of the 15 channels with the largest steps would be
  most of the error. They are kept in 8 more bits, in extra channels of the key, and ``q`` repeats those channels.
- *Values* have no bound. Each head of each token is divided by a power of two of its own, ``2^e``, which the attention
  itself multiplies back. One extra channel of the key holds ``e``, so that ``q · k`` grows by ``e · ln 2`` and the
  token's weight by ``2^e``. Eight extra channels of the value hold ``2^-e``, whose weighted mean is the factor by which
  the sum of the softmax has grown. With weights p: ``(Σ p 2^e (v / 2^e)) / (Σ p 2^e 2^-e) = Σ p v / Σ p``, which is
  the attention over the original values.

int8 holds both numbers exactly: e is an integer, and 2^-e is a power of two in one of eight channels, each with a scale
for its own range of e. The int8 kernel is slow for many new tokens, so prompts dequantize the cache and attend in fp32.

When one token is decoded, every operator costs time, however small, so queries, keys and values go through the same
operators together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops
from vlpack.layers.attention import CacheLengths, Heads, MakeBackend, Past, cache_lengths
from vlpack.layers.norm import rms_norm
from vlpack.layers.rope import Rope

EXTRA_CHANNELS = 16
"""Number of extra channels of each head in the cache; the kernel is slow if it is not a multiple of 16. In a key the
first one holds the exponent e and the other 15 hold rounding remainders; in a value the first eight hold 2^-e."""
EXPONENT_CHANNELS, OCTAVES_PER_CHANNEL = 8, 7
LOWEST_EXPONENT = -EXPONENT_CHANNELS * OCTAVES_PER_CHANNEL // 2
"""The smallest exponent e. The largest is ``LOWEST_EXPONENT + 55``, so that values from 4e-9 to 1e8 are covered."""
QUERY_SCALE = 2.0**-40
"""Factor that queries are scaled down by. Rounding turns them all into 0, so that computing the rounding remainders,
which keys need, leaves the queries unchanged."""
REMAINDER_STEP = 1 / 254
"""Step of the rounding remainders, in units of the channel's step: a remainder is at most half a step."""


def exponent_codes() -> tuple[np.ndarray, np.ndarray]:
    """Codes of all exponents in keys and values, and the number that a code of 1 stands for in each channel of a value.

    Returns:
        Codes ``[56, 2, EXTRA_CHANNELS]``. Row ``i`` is for the exponent ``e = LOWEST_EXPONENT + i``: for the key, e
        and then zeros; for the value, ``2^-e`` in one of eight channels and zeros in the others.
        Numbers ``[EXTRA_CHANNELS]``.
    """
    codes, worth = np.zeros((EXPONENT_CHANNELS * OCTAVES_PER_CHANNEL, 2, EXTRA_CHANNELS)), np.zeros(EXTRA_CHANNELS)
    for index in range(len(codes)):
        channel, octave = divmod(index, OCTAVES_PER_CHANNEL)
        codes[index, 0, 0] = LOWEST_EXPONENT + index
        codes[index, 1, channel] = 2 ** (OCTAVES_PER_CHANNEL - 1 - octave)  # 64, 32 … 1
        worth[channel] = 2.0 ** -(LOWEST_EXPONENT + channel * OCTAVES_PER_CHANNEL + OCTAVES_PER_CHANNEL - 1)
    return codes, worth


def halves_to_codes(codes: np.ndarray) -> np.ndarray:
    """A matrix ``[56, ..]`` that turns a vector of ``i + 1`` halves, then ones, into row ``i`` of ``codes [56, ..]``.

    Row ``i`` is ``codes[0]`` plus the differences ``codes[j] - codes[j - 1]`` for j up to ``i``. The factor
    ``2 - 2h`` is 1 if h is a half and 0 if h is 1; its constant part is added to the first row, whose h is always a
    half. All numbers are integers, so the product is exact.
    """
    steps = np.diff(codes, axis=0)
    return np.concatenate([2 * (codes[:1] + 2 * steps.sum(0, keepdims=True)), -2 * steps])


class Constants(NamedTuple):
    """Constants of the 8-bit cache that all layers share.

    A group is ``kv_heads`` heads; the groups are those of the queries, then one of keys and one of values. The cache
    holds values as ``v · 2^(LOWEST_EXPONENT - 1 - e)``; that power of two is computed as a product of halves.
    """

    thresholds: ir.Value  # [56]: the peak of a value exceeds 1 + (e - LOWEST_EXPONENT) of them
    extra: ir.Value  # [groups, 56, EXTRA_CHANNELS]: `halves_to_codes`; a half stands for a threshold that is exceeded
    extra_of_new: ir.Value  # [2, 56, EXTRA_CHANNELS]: the same for keys and values only
    steps: tuple[ir.Value, ir.Value]  # [kv_heads, D + EXTRA_CHANNELS] each: scales of the codes of keys and of values
    steps_of_new: ir.Value  # [2, 1, D + EXTRA_CHANNELS]: the same for the keys and values of a prompt
    worth: ir.Value  # [EXTRA_CHANNELS, 1]: turns the means of a value's extra channels into the divisor of the others
    ones: ir.Value  # [D]


def constants(op: OpBuilder, heads: int, kv_heads: int, size: int) -> Constants:
    """Make the constants for ``heads`` query heads and ``kv_heads`` key heads of ``size`` channels each."""
    codes, worth = exponent_codes()
    of_new = halves_to_codes(codes).transpose(1, 0, 2)  # [2, 56, EXTRA_CHANNELS]
    of_queries = np.zeros((heads // kv_heads, *of_new.shape[1:]))
    # this channel of the query turns the key's e into e · ln 2: the kernel then multiplies the token's weight by 2^e
    of_queries[:, 0, 0] = 2 * math.log(2) * size**0.5 * QUERY_SCALE
    least = 2.0 ** (LOWEST_EXPONENT - 1)
    steps = np.ones((2, size + EXTRA_CHANNELS))
    steps[0, size + 1 :] = REMAINDER_STEP
    steps[1, :size] = least / 127
    key_steps, value_steps = (np.tile(one, (kv_heads, 1)) for one in steps)
    return Constants(
        thresholds=ops.constant(op, [-1.0, *(2.0 ** (LOWEST_EXPONENT + i) for i in range(len(codes) - 1))]),
        extra=ops.constant(op, np.concatenate([of_queries, of_new])),
        extra_of_new=ops.constant(op, of_new),
        steps=(ops.constant(op, key_steps), ops.constant(op, value_steps)),
        steps_of_new=ops.constant(op, steps[:, None]),
        worth=ops.constant(op, least * worth[:, None]),
        ones=ops.constant(op, np.ones(size)),
    )


class Int8KVCache(NamedTuple):
    """An attention backend (`AttentionBackend`) over the 8-bit key/value cache that this module describes."""

    lengths: CacheLengths
    rope: Rope
    decode_rope: Rope  # for one new token: its row repeated for each key head, as if these were tokens
    decoding: ir.Value  # bool scalar: there is exactly one new token
    start: ir.Value  # int64 [1]: number of tokens already in the cache
    scaling: float  # factor of the rotary embedding's cosine and sine
    constants: Constants

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attention as `AttentionBackend` defines it, over a cache in int8 ``[B, kv_heads, P, D + EXTRA_CHANNELS]``."""
        batch, (queries, kv_heads, size) = ops.shape_of(past[0])[0], heads[:3]
        wide, groups, scale = size + EXTRA_CHANNELS, queries // kv_heads + 2, size**-0.5 / QUERY_SCALE
        assert heads.norms is not None, "the 8-bit cache needs normalized keys"
        step, selector = _key_steps(op, heads.norms[1], size, self.rope.channels or size, self.scaling)
        q_weight, k_weight = op.Mul(heads.norms[0], op.Mul(step, QUERY_SCALE)), op.Div(heads.norms[1], step)
        repeated = [op.Expand(weight, [n, kv_heads, size]) for weight, n in ((q_weight, groups - 2), (k_weight, 1))]
        weights = op.Concat(*repeated, axis=0)  # [groups - 1, kv_heads, D]

        def one_token(op: OpBuilder) -> list[ir.Value]:
            parts = op.Reshape(qkv, [0, groups, kv_heads, size])
            qk, v = op.Split(parts, [groups - 1, 1], axis=1, _outputs=2)
            # onnxruntime's norm is slow if every head has its own weights, so these are multiplied afterwards
            qk = op.Mul(rms_norm(op, qk, self.constants.ones, heads.eps), weights)
            # the rotary operator takes each head for a token and each group for a head
            cos, sin, rows, channels = self.decode_rope
            qk = ops.rotary(op, qk, rows, cos, sin, groups - 1, channels)
            extended = self._extended(op, qk, v, 1, selector, self.constants.extra)
            new = op.Reshape(extended, [0, 1, groups * kv_heads * wide])
            y, *present = ops.group_query_attention_int8(
                op, new, past, self.lengths, queries, kv_heads, self.constants.steps, scale
            )
            y, sums = op.Split(op.Reshape(y, [0, 0, queries, wide]), [size, EXTRA_CHANNELS], axis=-1, _outputs=2)
            y = op.Div(y, op.MatMul(sums, self.constants.worth))
            return [op.Reshape(y, [0, 0, queries * size]), *present]

        def more_tokens(op: OpBuilder) -> list[ir.Value]:
            scaled = heads._replace(norms=(q_weight, k_weight))
            q, k, v = scaled.split_norm_rotate(op, qkv, self.rope, ops.FLOAT)
            earlier = [op.Cast(op.Slice(x, [0], self.start, [2]), to=ops.FLOAT) for x in past]
            keys, extra = op.Split(earlier[0], [size, EXTRA_CHANNELS], axis=-1, _outputs=2)  # [B, kv_heads, P, ..]
            keys = op.Add(keys, op.MatMul(op.Mul(extra, REMAINDER_STEP), op.Transpose(selector, perm=[1, 0])))
            values, _ = op.Split(earlier[1], [size, EXTRA_CHANNELS], axis=-1, _outputs=2)
            exponents = op.Slice(extra, [0], [1], [3])
            values = op.Mul(values, op.Mul(op.Pow(2.0, exponents), 1 / 127))
            shape = [batch, kv_heads, "past", size]
            cache = ops.typed(keys, ops.FLOAT, shape), ops.typed(values, ops.FLOAT, shape)
            y, _, _ = ops.group_query_attention(op, q, k, v, cache, self.lengths, queries, kv_heads, scale)
            k, v = (op.Reshape(x, [0, 0, 1, kv_heads, size]) for x in (k, v))
            new = op.Div(
                self._extended(op, k, v, 2, selector, self.constants.extra_of_new), self.constants.steps_of_new
            )
            # QuantizeLinear is slow with one scale per element of the last dimension, so the division comes before it
            codes = op.Split(op.QuantizeLinear(new, 1.0, output_dtype=ir.DataType.INT8), [1, 1], axis=2, _outputs=2)
            return [y, *(self._written(op, *args) for args in zip(past, codes, strict=True))]

        branches = {"then_branch": _branch(op, one_token), "else_branch": _branch(op, more_tokens)}
        y, *present = op.If(self.decoding, **branches, _outputs=3)
        for one in present:
            ops.typed(one, ir.DataType.INT8, [batch, kv_heads, "total_sequence_length", wide])
        return ops.typed(y, ops.FLOAT, ops.last_dim(qkv, queries * size)), present[0], present[1]

    def _extended(
        self, op: OpBuilder, qk: ir.Value, v: ir.Value, axis: int, selector: ir.Value, extra: ir.Value
    ) -> ir.Value:
        """Queries, keys and values with the extra channels appended, ``[.., groups, kv_heads, D + EXTRA_CHANNELS]``.

        Args:
            op: the graph under construction.
            qk: the query groups (perhaps none) and the group of keys, ``[.., groups - 1, kv_heads, D]``.
            v: values ``[.., 1, kv_heads, D]``.
            axis: axis of the groups.
            selector: matrix from `_key_steps` that selects the channels with remainders.
            extra: ``extra`` or ``extra_of_new`` of `Constants`, for these groups.
        """
        peak = op.ReduceMax(op.Abs(v), [-1], keepdims=1)
        passed = op.Where(op.Greater(peak, self.constants.thresholds), 0.5, 1.0)  # [.., 1, kv_heads, 56]
        x = op.Concat(qk, op.Mul(v, op.ReduceProd(passed, [-1], keepdims=1)), axis=axis)
        picked = op.MatMul(x, selector)  # for values, these remainders are too small to change a code
        left = op.Sub(picked, op.Round(picked))
        return op.Concat(x, op.Add(left, op.MatMul(passed, extra)), axis=-1)

    def _written(self, op: OpBuilder, cache: ir.Value, new: ir.Value) -> ir.Value:
        """The cache with the codes ``new [B, S, 1, kv_heads, D + EXTRA_CHANNELS]`` written at its end."""
        codes = op.Transpose(op.Squeeze(new, [2]), perm=[0, 2, 1, 3])
        missing = op.Sub(op.Cast(self.lengths.total, to=ops.INT64), op.Shape(cache, start=2, end=3))
        room = op.Concat([0] * 6, op.Max(missing, 0), [0], axis=0)  # 0 if the runtime allocated it
        at = op.Expand(self.start, op.Shape(new, start=0, end=1))
        return op.TensorScatter(op.Pad(cache, room), codes, at, axis=2)


def _branch(op: OpBuilder, trace: Callable[[OpBuilder], list[ir.Value]]) -> ir.Graph:
    """A subgraph with the three outputs that ``trace`` returns.

    The name of ``trace`` becomes part of the name of every value in it, because these must be unique in the model.
    """

    def scoped(op: OpBuilder) -> list[ir.Value]:
        op.builder.push_module(trace.__name__)
        outputs = trace(op)
        op.builder.pop_module()
        return outputs

    return op.builder.subgraph(scoped, [], [ir.Value(name="") for _ in range(3)], name=trace.__name__)


def _key_steps(op: OpBuilder, weight: ir.Value, size: int, rotated: int, scaling: float) -> tuple[ir.Value, ir.Value]:
    """The quantization step of each key channel, for keys that were normalized, scaled by ``weight [D]`` and rotated.

    Only the first ``rotated`` channels turn, and only those are multiplied by ``scaling``. onnxruntime folds all of it
    into constants when it loads the graph.

    Returns:
        steps ``[D]``, and a matrix ``[D, EXTRA_CHANNELS]`` of zeros and ones that selects the channels whose rounding
        remainders are kept. Its first column, the exponent's place, is zeros.
    """
    weight, still = op.Abs(weight), None
    if rotated < size:
        weight, still = op.Split(weight, [rotated, size - rotated], axis=0, _outputs=2)
    larger = op.ReduceMax(op.Reshape(weight, [2, rotated // 2]), [0], keepdims=0)
    half = op.Add(op.Mul(larger, scaling * size**0.5 / 127), 1e-20)  # a channel of weight 0 has codes of 0
    rest = [] if still is None else [op.Add(op.Mul(still, size**0.5 / 127), 1e-20)]
    step = op.Concat(half, half, *rest, axis=0)
    _, places = op.TopK(step, [min(EXTRA_CHANNELS - 1, size)], _outputs=2)
    chosen = op.Equal(op.Unsqueeze(op.Range(0, size, 1), [1]), places)  # [D, EXTRA_CHANNELS - 1]
    return step, op.Pad(op.Cast(chosen, to=ops.FLOAT), [0, 1, 0, EXTRA_CHANNELS - 1 - min(EXTRA_CHANNELS - 1, size)])


def int8_kv_cache(heads: int, kv_heads: int, size: int, scaling: float) -> MakeBackend:
    """A function that makes the attention backend of an 8-bit key/value cache.

    Args:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        size: channels of each head.
        scaling: factor of the rotary embedding's cosine and sine.
    """

    def make(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value, rope: Rope) -> Int8KVCache:
        lengths = cache_lengths(op, attention_mask)
        new = op.Shape(position_ids, start=-1)
        start = op.Sub(op.Reshape(op.Cast(lengths.total, to=ops.INT64), [1]), new)
        # the operator requires at least as many rows as tokens, even if all tokens use the same row
        cos, sin = (op.Pad(table, [0, 0, kv_heads, 0]) for table in (rope.cos, rope.sin))
        decode_rope = rope._replace(cos=cos, sin=sin, rows=op.Expand(op.Slice(rope.rows, [0], [1], [1]), [1, kv_heads]))
        decoding = op.Squeeze(op.Equal(new, 1))
        return Int8KVCache(lengths, rope, decode_rope, decoding, start, scaling, constants(op, heads, kv_heads, size))

    return make
