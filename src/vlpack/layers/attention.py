"""Causal self-attention of the text decoders, over a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.channels import RowChannels, value_channels
from vlpack.layers.linear import Linear, Stored
from vlpack.layers.norm import NormWeight, rms_norm
from vlpack.layers.rope import Rope

Past = tuple[ir.Value, ir.Value]
"""The cache of a layer for the tokens so far: keys and values ``[B, kv_heads, P, D]``, or the two states of a
linear-attention layer (`vlpack.layers.delta_net`)."""


class Heads(NamedTuple):
    """The attention heads in a layer's joint projection ``[B, S, (queries + 2 · keys) · size]``."""

    queries: int  # number of query heads
    keys: int  # number of key heads, and of value heads
    size: int  # channels of each head
    norms: tuple[ir.Value, ir.Value] | None  # weights [D] of the RMS norms on every query and key head
    eps: float  # epsilon of these norms

    def split_norm_rotate(
        self, op: OpBuilder, qkv: ir.Value, rope: Rope, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values ``[B, S, heads · D]``; queries and keys are normalized and rotated in fp32."""
        counts = self.queries, self.keys, self.keys
        q, k, v = op.Split(qkv, [count * self.size for count in counts], axis=-1, _outputs=3)
        q_norm, k_norm = self.norms or (None, None)
        q, k = self._norm_rotate(op, q, self.queries, q_norm, rope), self._norm_rotate(op, k, self.keys, k_norm, rope)
        q, k, v = (ops.cast(op, x, dtype) for x in (q, k, v))
        return q, k, v

    def _norm_rotate(self, op: OpBuilder, x: ir.Value, count: int, norm: ir.Value | None, rope: Rope) -> ir.Value:
        x = ops.cast(op, x, ops.FLOAT)
        if norm is not None:
            split = rms_norm(op, op.Reshape(x, [0, 0, count, self.size]), norm, self.eps)
            x = op.Reshape(split, [0, 0, count * self.size])
        return ops.rotary(op, x, rope.rows, rope.cos, rope.sin, count, rope.channels)


class AttentionBackend(Protocol):
    """Attention of new tokens to the cache and to each other; made once per graph and used by all layers."""

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention over the cache ``past`` and the new tokens, whose joint projection ``qkv`` has ``heads``.

        Returns:
            output ``[B, S, heads · D]``, present key and value ``[B, kv_heads, total, D]``.
        """


MakeBackend = Callable[[OpBuilder, ir.Value, ir.Value, Rope], AttentionBackend]
"""Makes the attention of all layers from ``attention_mask`` int64 [B, total], ``position_ids`` [.., B, S] and their
rotary angles."""

SelectTokens = Callable[[OpBuilder, ir.Value], ir.Value]
"""Selects the tokens whose outputs are needed, ``[B, S, ..] → [B, fewer, ..]``."""


class CacheLengths(NamedTuple):
    """The lengths that GroupQueryAttention takes instead of an attention mask.

    With them it can write the new keys and values into the buffer of the old ones.
    """

    seqlens_k: ir.Value  # int32 [B]: valid keys - 1
    total: ir.Value  # int32 scalar: width of the attention mask


def cache_lengths(op: OpBuilder, attention_mask: ir.Value) -> CacheLengths:
    """The lengths of an ``attention_mask`` int64 [B, total] whose rows are ones followed by zeros."""
    valid = op.ReduceSum(attention_mask, [1], keepdims=0)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    return CacheLengths(op.Cast(op.Sub(valid, 1), to=ops.INT32), op.Cast(total, to=ops.INT32))


class GroupedQuery(NamedTuple):
    """An attention backend that uses onnxruntime's fused operator GroupQueryAttention."""

    lengths: CacheLengths
    rope: Rope

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention, as `AttentionBackend` defines it."""
        q, k, v = heads.split_norm_rotate(op, qkv, self.rope, ops.dtype_of(past[0]))
        return ops.group_query_attention(op, q, k, v, past, self.lengths, heads.queries, heads.keys)


def grouped_query(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value, rope: Rope) -> GroupedQuery:
    """Make the attention backend `GroupedQuery`, which does not need ``position_ids``."""
    return GroupedQuery(cache_lengths(op, attention_mask), rope)


class MaskBias(NamedTuple):
    """An attention backend in ONNX's standard operators, for providers without a kernel of the fused one.

    The cache grows by concatenation.
    """

    rope: Rope
    bias: ir.Value  # fp32 [B, 1, 1, S, total]: 0 where a token attends to a key, next to -∞ elsewhere

    def __call__(self, op: OpBuilder, qkv: ir.Value, heads: Heads, past: Past) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention, as `AttentionBackend` defines it."""
        batch, size, kv_heads = ops.shape_of(past[0])[0], heads.size, heads.keys
        q, k, v = heads.split_norm_rotate(op, qkv, self.rope, ops.dtype_of(past[0]))
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
    """Make the attention backend `MaskBias` from ``attention_mask`` int64 [B, total].

    Only the last dimension of ``position_ids`` [.., S] is used: the number of new tokens.
    """
    length, total = op.Squeeze(op.Shape(position_ids, start=-1)), op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    token = op.Unsqueeze(op.Range(op.Sub(total, length), total, 1), [1])  # [S, 1], counted from the cache's beginning
    causal = op.LessOrEqual(op.Range(0, total, 1), token)  # [S, total]
    valid = op.Cast(op.Unsqueeze(attention_mask, [1, 2, 3]), to=ir.DataType.BOOL)  # [B, 1, 1, 1, total]
    # not -∞: the softmax over a padding token, which may attend to nothing, would be NaN
    return MaskBias(rope, op.Where(op.And(causal, valid), 0.0, -1e30))


def has_grouped_kernel(provider: str, dtype: ir.DataType) -> bool:
    """Whether onnxruntime has a GroupQueryAttention kernel for a provider and dtype: on CUDA only for fp16 and bf16.

    Without a kernel, `MaskBias` is used, and the runtime must not share one buffer between past and present.
    """
    return not (provider == "cuda" and dtype == ops.FLOAT)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, in Qwen3, an RMS norm on every query and key head.

    With ``output_gate``, q_proj computes for each head its query and then a gate, by whose sigmoid the head's output is
    multiplied.

    Source: Ainslie et al. 2023 (arXiv:2305.13245); transformers' ``Qwen3VLTextAttention`` and, with the gate,
    ``Qwen3_5Attention``.
    """

    place = "self_attn"
    """Name of the module in a decoder layer."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
        norm_offset: float = 0.0,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        self.heads = Heads(num_attention_heads, num_key_value_heads, head_dim, None, qk_norm_eps or 0.0)
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        sizes = (2 * q_size if output_gate else q_size, kv_size, kv_size)
        stacked = list(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True))
        self.qkv_proj = Linear(hidden_size, sum(sizes), bias=qkv_bias, stacked=stacked)
        self.q_norm = NormWeight(head_dim, norm_offset) if qk_norm_eps is not None else None
        self.k_norm = NormWeight(head_dim, norm_offset) if qk_norm_eps is not None else None
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias)
        self.output_gate = output_gate

    def forward(
        self, op: OpBuilder, x: ir.Value, backend: AttentionBackend, past: Past, select_tokens: SelectTokens
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        heads = self.heads
        if self.q_norm is not None and self.k_norm is not None:
            heads = heads._replace(norms=(self.q_norm(op), self.k_norm(op)))
        qkv, gate = self.qkv_proj(op, x), None
        if self.output_gate:
            qkv, gate = self._split_gate(op, qkv)
        y, key, value = backend(op, qkv, heads, past)
        y = select_tokens(op, y)
        if gate is not None:
            gate = op.Sigmoid(ops.cast(op, select_tokens(op, gate), ops.FLOAT))
            y = op.Mul(ops.cast(op, y, ops.FLOAT), gate)
        return self.o_proj(op, y), key, value

    def _split_gate(self, op: OpBuilder, projected: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The joint projection of queries, keys and values without the gates, and the gates ``[B, S, heads · D]``."""
        queries, keys, size = self.heads[:3]
        q, kv = op.Split(projected, [2 * queries * size, 2 * keys * size], axis=-1, _outputs=2)
        q, gate = op.Split(op.Reshape(q, [0, 0, queries, 2 * size]), [size, size], axis=-1, _outputs=2)
        q, gate = (op.Reshape(half, [0, 0, queries * size]) for half in (q, gate))
        return op.Concat(q, kv, axis=-1), gate

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        return [self.qkv_proj]

    def channels(self) -> list[RowChannels]:
        """The channels that can be rescaled or rotated within the weights (`vlpack.layers.channels`)."""
        heads = self.heads
        values = value_channels(self.qkv_proj, self.o_proj, heads.queries, heads.keys, heads.size)
        # a gate is multiplied to each channel by itself, so gated channels can be rescaled but not mixed
        return [replace(values, mixes=not self.output_gate)]
