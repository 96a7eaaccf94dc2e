"""Causal self-attention of the text decoders, over a key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.channels import RowChannels, value_channels
from vlpack.layers.linear import Linear, Stored
from vlpack.layers.norm import NormWeight, rms_norm
from vlpack.layers.rope import Rope

Past = tuple[ir.Value, ir.Value]
"""Keys and values so far, ``[B, kv_heads, P, D]``."""


class Heads(NamedTuple):
    """What a layer's projection ``[B, S, (queries + 2 · keys) · size]`` holds: queries, keys and values."""

    queries: int
    keys: int  # and values
    size: int
    norms: tuple[ir.Value, ir.Value] | None  # weights [D] of the RMS norms on every query and key head
    eps: float  # of these

    def place(
        self, op: OpBuilder, qkv: ir.Value, rope: Rope, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values ``[B, S, heads · D]``, the former two normalized and rotated in fp32."""
        counts = self.queries, self.keys, self.keys
        q, k, v = op.Split(qkv, [count * self.size for count in counts], axis=-1, _outputs=3)
        q_norm, k_norm = self.norms or (None, None)
        q, k = self._place(op, q, self.queries, q_norm, rope), self._place(op, k, self.keys, k_norm, rope)
        q, k, v = (ops.cast(op, x, dtype) for x in (q, k, v))
        return q, k, v

    def _place(self, op: OpBuilder, x: ir.Value, count: int, norm: ir.Value | None, rope: Rope) -> ir.Value:
        x = ops.cast(op, x, ops.FLOAT)
        if norm is not None:
            split = rms_norm(op, op.Reshape(x, [0, 0, count, self.size]), norm, self.eps)
            x = op.Reshape(split, [0, 0, count * self.size])
        return ops.rotary(op, x, rope.rows, rope.cos, rope.sin, count)


class Attend(Protocol):
    """How new tokens attend to the cache and to each other: made of the attention mask once, and used by all layers."""

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention over the cache and the new tokens ``qkv``, which ``heads`` takes apart.

        Returns:
            output ``[B, S, heads · D]``, present key and value ``[B, kv_heads, total, D]``.
        """


MakeAttend = Callable[[OpBuilder, ir.Value, ir.Value, Rope], Attend]
"""From ``attention_mask`` int64 [B, total], ``position_ids`` [.., B, S] and the angles of these."""

Pick = Callable[[OpBuilder, ir.Value], ir.Value]
"""The tokens that matter, ``[B, S, ..] → [B, fewer, ..]``."""


class CacheLengths(NamedTuple):
    """What GroupQueryAttention asks of the attention mask. It can write new keys into the buffer of the old ones."""

    seqlens_k: ir.Value  # int32 [B]: valid keys - 1
    total: ir.Value  # int32 scalar: width of the mask


def cache_lengths(op: OpBuilder, attention_mask: ir.Value) -> CacheLengths:
    """Lengths from ``attention_mask`` int64 [B, total], ones before zeros."""
    valid = op.ReduceSum(attention_mask, [1], keepdims=0)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    return CacheLengths(op.Cast(op.Sub(valid, 1), to=ops.INT32), op.Cast(total, to=ops.INT32))


class GroupedQuery(NamedTuple):
    """Attention in onnxruntime's fused operator."""

    lengths: CacheLengths
    rope: Rope

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Attend`."""
        q, k, v = heads.place(op, qkv, self.rope, ops.dtype_of(past[0]))
        return ops.group_query_attention(op, q, k, v, past, self.lengths, heads.queries, heads.keys)


def grouped_query(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value, rope: Rope) -> GroupedQuery:
    """See `GroupedQuery`; no need of ``position_ids``."""
    return GroupedQuery(cache_lengths(op, attention_mask), rope)


class MaskBias(NamedTuple):
    """The same in ONNX's own operators, where the fused one has no kernel. The cache grows by concatenation."""

    rope: Rope
    bias: ir.Value  # fp32 [B, 1, 1, S, total]: 0 where a token attends to a key, next to -∞ elsewhere

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Attend`."""
        batch, size, kv_heads = ops.shape_of(past[0])[0], heads.size, heads.keys
        q, k, v = heads.place(op, qkv, self.rope, ops.dtype_of(past[0]))
        q = op.Reshape(op.Mul(q, float(size) ** -0.5), [0, 0, kv_heads, heads.queries // kv_heads, size])
        q = op.Transpose(q, perm=[0, 2, 3, 1, 4])  # [B, kv_heads, group, S, D]
        present = []
        for cache, new in zip(past, (k, v), strict=True):
            split = op.Transpose(op.Reshape(new, [0, 0, kv_heads, size]), perm=[0, 2, 1, 3])
            joined = op.Concat(cache, split, axis=2)
            present.append(ops.typed(joined, ops.dtype_of(q), [batch, kv_heads, "total_sequence_length", size]))
        # the heads of a group share keys and values: MatMul broadcasts these over the group
        key, value = (op.Unsqueeze(one, [2]) for one in present)  # [B, kv_heads, 1, total, D]
        scores = op.MatMul(q, op.Transpose(key, perm=[0, 1, 2, 4, 3]))  # [B, kv_heads, group, S, total]
        y = op.MatMul(op.Softmax(op.Add(scores, self.bias), axis=-1), value)
        y = op.Reshape(op.Transpose(y, perm=[0, 3, 1, 2, 4]), [0, 0, heads.queries * size])
        return y, present[0], present[1]


def mask_bias(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value, rope: Rope) -> MaskBias:
    """The bias from ``attention_mask`` int64 [B, total]; ``position_ids`` [.., S] tells the number of new tokens."""
    length, total = op.Squeeze(op.Shape(position_ids, start=-1)), op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    token = op.Unsqueeze(op.Range(op.Sub(total, length), total, 1), [1])  # [S, 1], counted from the cache's beginning
    causal = op.LessOrEqual(op.Range(0, total, 1), token)  # [S, total]
    valid = op.Cast(op.Unsqueeze(attention_mask, [1, 2, 3]), to=ir.DataType.BOOL)  # [B, 1, 1, 1, total]
    # not -∞, which would make NaNs of the row of a pad that may attend to nothing
    return MaskBias(rope, op.Where(op.And(causal, valid), 0.0, -1e30))


def has_grouped_kernel(provider: str, dtype: ir.DataType) -> bool:
    """Whether onnxruntime has a kernel of GroupQueryAttention: on CUDA it is for fp16 and bf16 only.

    Where it has none, `MaskBias` takes its place, and the runtime must not share the buffers of past and present.
    """
    return not (provider == "cuda" and dtype == ops.FLOAT)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, in Qwen3, an RMS norm on every query and key head.

    Source: Ainslie et al. 2023 (arXiv:2305.13245); transformers' ``Qwen3VLTextAttention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.heads = Heads(num_attention_heads, num_key_value_heads, head_dim, None, qk_norm_eps or 0.0)
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        sizes = (q_size, kv_size, kv_size)
        stacked = list(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True))
        self.qkv_proj = Linear(hidden_size, sum(sizes), bias=qkv_bias, stacked=stacked)
        self.q_norm = NormWeight(head_dim) if qk_norm_eps is not None else None
        self.k_norm = NormWeight(head_dim) if qk_norm_eps is not None else None
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias)

    def forward(
        self, op: OpBuilder, x: ir.Value, attend: Attend, past: Past, pick: Pick
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        heads = self.heads
        if self.q_norm is not None and self.k_norm is not None:
            heads = heads._replace(norms=(self.q_norm(op), self.k_norm(op)))
        y, key, value = attend(op, self.qkv_proj(op, x), heads, past)
        return self.o_proj(op, pick(op, y)), key, value

    @property
    def readers(self) -> list[Stored]:
        """What multiplies the module's input."""
        return [self.qkv_proj]

    def channels(self) -> list[RowChannels]:
        """See `vlpack.layers.channels`."""
        heads = self.heads
        return [value_channels(self.qkv_proj, self.o_proj, heads.queries, heads.keys, heads.size)]
