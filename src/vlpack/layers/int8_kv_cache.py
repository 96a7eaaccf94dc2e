"""A key-value cache of 8 bits on the CPU: a quarter of fp32's bytes to read for every token.

onnxruntime's GroupQueryAttention reads keys and values of int8, ``code · scale[head, channel]``, with scales that the
graph must know beforehand. Nothing is calibrated here, so they come from what is certain:

- *Keys* have been through an RMS norm, so no channel leaves ``sqrt(D) · |weight|``; the rotation mixes two channels,
  of which the larger weight counts: a 127th of it is the channels' step. The norm's weight is divided by the step, so
  that keys are in steps and their codes are they, rounded; that of the queries is multiplied by it. What rounding
  leaves of the 15 channels with the largest steps, which would be most of the error, is kept in 8 more bits beside
  them, and ``q`` has the same channels twice.
- *Values* have no bound. Each head of each token is divided by its own power of two, ``2^e``, which the attention
  itself multiplies back: one more channel of the key is ``e``, so that ``q · k`` grows by ``e · ln 2`` and the token's
  weight by ``2^e``, and eight of the value are ``2^-e``, whose weighted mean is what the softmax's sum has grown by.
  With weights p: ``(Σ p 2^e (v / 2^e)) / (Σ p 2^e 2^-e) = Σ p v / Σ p``, the attention over the values as they were.

Both are integers that int8 holds exactly: e itself, and 2^-e as one power of two in that of eight channels whose scale
is near. Reading int8 is slow where many tokens are new, so prompts dequantize the cache and attend in fp32.

For one token every operator costs, however small: queries, keys and values go through the same ones together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops
from vlpack.layers.attention import CacheLengths, Heads, MakeAttend, Past, cache_lengths
from vlpack.layers.int8_kv_codes import EXTRA, LEFT, LESS, Constants, constants
from vlpack.layers.norm import rms_norm
from vlpack.layers.rope import Rope


class ByteCache(NamedTuple):
    """Attention over the 8-bit cache; see the module."""

    lengths: CacheLengths
    rope: Rope
    beside: Rope  # for one new token: as many tokens in its place as keys have heads
    decoding: ir.Value  # bool scalar: there is one new token
    start: ir.Value  # int64 [1]: how many tokens the cache has
    scaling: float  # what cosine and sine are multiplied by
    constants: Constants

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `vlpack.layers.attention.Attend`; the cache is int8 ``[B, kv_heads, P, D + EXTRA]``."""
        batch, (queries, kv_heads, size) = ops.shape_of(past[0])[0], heads[:3]
        wide, groups, scale = size + EXTRA, queries // kv_heads + 2, size**-0.5 / LESS
        assert heads.norms is not None, "an 8-bit cache is for keys that are normalized"
        step, pick = _key_steps(op, heads.norms[1], size, self.scaling)
        q_weight, k_weight = op.Mul(heads.norms[0], op.Mul(step, LESS)), op.Div(heads.norms[1], step)
        repeated = [op.Expand(weight, [n, kv_heads, size]) for weight, n in ((q_weight, groups - 2), (k_weight, 1))]
        weights = op.Concat(*repeated, axis=0)  # [groups - 1, kv_heads, D]

        def one_token(op: OpBuilder) -> list[ir.Value]:
            parts = op.Reshape(qkv, [0, groups, kv_heads, size])
            qk, v = op.Split(parts, [groups - 1, 1], axis=1, _outputs=2)
            # onnxruntime's norm is slow where every head has weights of its own
            qk = op.Mul(rms_norm(op, qk, self.constants.ones, heads.eps), weights)
            # a head is a token to the rotation, and a group a head
            qk = ops.rotary(op, qk, self.beside.rows, self.beside.cos, self.beside.sin, groups - 1)
            extended = self._extended(op, qk, v, 1, pick, self.constants.extra)
            new = op.Reshape(extended, [0, 1, groups * kv_heads * wide])
            y, *present = ops.byte_attention(
                op, new, past, self.lengths, queries, kv_heads, self.constants.steps, scale
            )
            y, sums = op.Split(op.Reshape(y, [0, 0, queries, wide]), [size, EXTRA], axis=-1, _outputs=2)
            y = op.Div(y, op.MatMul(sums, self.constants.worth))
            return [op.Reshape(y, [0, 0, queries * size]), *present]

        def more_tokens(op: OpBuilder) -> list[ir.Value]:
            q, k, v = heads._replace(norms=(q_weight, k_weight)).place(op, qkv, self.rope, ops.FLOAT)
            earlier = [op.Cast(op.Slice(x, [0], self.start, [2]), to=ops.FLOAT) for x in past]
            keys, extra = op.Split(earlier[0], [size, EXTRA], axis=-1, _outputs=2)  # [B, kv_heads, P, ..]
            keys = op.Add(keys, op.MatMul(op.Mul(extra, LEFT), op.Transpose(pick, perm=[1, 0])))
            values, _ = op.Split(earlier[1], [size, EXTRA], axis=-1, _outputs=2)
            exponents = op.Slice(extra, [0], [1], [3])
            values = op.Mul(values, op.Mul(op.Pow(2.0, exponents), 1 / 127))
            shape = [batch, kv_heads, "past", size]
            cache = ops.typed(keys, ops.FLOAT, shape), ops.typed(values, ops.FLOAT, shape)
            y, _, _ = ops.group_query_attention(op, q, k, v, cache, self.lengths, queries, kv_heads, scale)
            k, v = (op.Reshape(x, [0, 0, 1, kv_heads, size]) for x in (k, v))
            new = op.Div(self._extended(op, k, v, 2, pick, self.constants.extra_of_new), self.constants.steps_of_new)
            # QuantizeLinear is slow where it has scales of its own for the last dimension
            codes = op.Split(op.QuantizeLinear(new, 1.0, output_dtype=ir.DataType.INT8), [1, 1], axis=2, _outputs=2)
            return [y, *(self._written(op, *args) for args in zip(past, codes, strict=True))]

        branches = {"then_branch": _branch(op, one_token), "else_branch": _branch(op, more_tokens)}
        y, *present = op.If(self.decoding, **branches, _outputs=3)
        for one in present:
            ops.typed(one, ir.DataType.INT8, [batch, kv_heads, "total_sequence_length", wide])
        return ops.typed(y, ops.FLOAT, ops.last_dim(qkv, queries * size)), present[0], present[1]

    def _extended(
        self, op: OpBuilder, qk: ir.Value, v: ir.Value, axis: int, pick: ir.Value, extra: ir.Value
    ) -> ir.Value:
        """With the channels that an 8-bit cache has beside, ``[.., groups, kv_heads, D + EXTRA]``.

        Args:
            op: the graph under construction.
            qk: groups of queries, or none, and that of keys, ``[.., groups - 1, kv_heads, D]``.
            v: values ``[.., 1, kv_heads, D]``.
            axis: of the groups.
            pick: see `_key_steps`.
            extra: see `Constants`, for these groups.
        """
        peak = op.ReduceMax(op.Abs(v), [-1], keepdims=1)
        passed = op.Where(op.Greater(peak, self.constants.thresholds), 0.5, 1.0)  # [.., 1, kv_heads, 56]
        x = op.Concat(qk, op.Mul(v, op.ReduceProd(passed, [-1], keepdims=1)), axis=axis)
        picked = op.MatMul(x, pick)  # what that is of the values is too small for a code
        left = op.Sub(picked, op.Round(picked))
        return op.Concat(x, op.Add(left, op.MatMul(passed, extra)), axis=-1)

    def _written(self, op: OpBuilder, cache: ir.Value, new: ir.Value) -> ir.Value:
        """The cache with the codes ``new [B, S, 1, kv_heads, D + EXTRA]`` at its end."""
        codes = op.Transpose(op.Squeeze(new, [2]), perm=[0, 2, 1, 3])
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


def _key_steps(op: OpBuilder, weight: ir.Value, size: int, scaling: float) -> tuple[ir.Value, ir.Value]:
    """For keys that were normalized, weighed by ``weight [D]`` and rotated; onnxruntime computes this once, at loading.

    Returns:
        a channel's step ``[D]``; and a matrix ``[D, EXTRA]`` of ones and zeros that picks the channels which have a
        second one: the first column is zeros.
    """
    halves = op.Reshape(op.Abs(weight), [2, size // 2])
    larger = op.ReduceMax(halves, [0], keepdims=0)
    half = op.Add(op.Mul(larger, scaling * size**0.5 / 127), 1e-20)  # a channel of weight 0 has codes of 0
    step = op.Concat(half, half, axis=0)
    _, places = op.TopK(step, [min(EXTRA - 1, size)], _outputs=2)
    chosen = op.Equal(op.Unsqueeze(op.Range(0, size, 1), [1]), places)  # [D, EXTRA - 1]
    return step, op.Pad(op.Cast(chosen, to=ops.FLOAT), [0, 1, 0, EXTRA - 1 - min(EXTRA - 1, size)])


def byte_cache(heads: int, kv_heads: int, size: int, scaling: float) -> MakeAttend:
    """Makes the attention over 8-bit caches, of ``size`` channels a head; ``scaling`` is of the rotary tables."""

    def make(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value, rope: Rope) -> ByteCache:
        lengths = cache_lengths(op, attention_mask)
        new = op.Shape(position_ids, start=-1)
        start = op.Sub(op.Reshape(op.Cast(lengths.total, to=ops.INT64), [1]), new)
        # the operator wants no fewer rows than there are tokens, even where all have the same
        cos, sin = (op.Pad(table, [0, 0, kv_heads, 0]) for table in (rope.cos, rope.sin))
        beside = Rope(cos, sin, op.Expand(op.Slice(rope.rows, [0], [1], [1]), [1, kv_heads]))
        decoding = op.Squeeze(op.Equal(new, 1))
        return ByteCache(lengths, rope, beside, decoding, start, scaling, constants(op, heads, kv_heads, size))

    return make
