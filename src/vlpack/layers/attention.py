"""Causal self-attention of the text decoders, over a key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.linear import Linear
from vlpack.layers.norm import RMSNorm
from vlpack.layers.rope import Rope

Past = tuple[ir.Value, ir.Value]
"""Keys and values so far, ``[B, kv_heads, P, D]``."""


class Attend(Protocol):
    """How new tokens attend to the cache and to each other: made of the attention mask once, and used by all layers."""

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
        """Causal attention of ``q [B, S, heads · D]`` over the cache and the new ``k`` and ``v [B, S, kv_heads · D]``.

        ``key_weight [D]`` is that of the RMS norm that the keys went through before the rotation; None without one.

        Returns:
            output ``[B, S, heads · D]``, present key and value ``[B, kv_heads, total, D]``.
        """


MakeAttend = Callable[[OpBuilder, ir.Value, ir.Value], Attend]
"""From ``attention_mask`` int64 [B, total] and ``position_ids`` [.., B, S]."""

Pick = Callable[[OpBuilder, ir.Value], ir.Value]
"""The tokens that matter, ``[B, S, ..] → [B, fewer, ..]``."""


class CacheLengths(NamedTuple):
    """What GroupQueryAttention asks of the attention mask. It can write new keys into the buffer of the old ones."""

    seqlens_k: ir.Value  # int32 [B]: valid keys - 1
    total: ir.Value  # int32 scalar: width of the mask

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
        """See `Attend`."""
        return ops.group_query_attention(op, q, k, v, past, self, heads, kv_heads)


def cache_lengths(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value | None = None) -> CacheLengths:
    """Lengths from ``attention_mask`` int64 [B, total], ones before zeros; no need of ``position_ids``."""
    valid = op.ReduceSum(attention_mask, [1], keepdims=0)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    return CacheLengths(op.Cast(op.Sub(valid, 1), to=ops.INT32), op.Cast(total, to=ops.INT32))


class MaskBias(NamedTuple):
    """The same in ONNX's own operators, where the fused one has no kernel. The cache grows by concatenation."""

    bias: ir.Value  # fp32 [B, 1, 1, S, total]: 0 where a token attends to a key, next to -∞ elsewhere

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
        """See `Attend`."""
        batch, _, _, size = ops.shape_of(past[0])
        assert isinstance(size, int), "the cache's head size is known"
        q = op.Reshape(op.Mul(q, float(size) ** -0.5), [0, 0, kv_heads, heads // kv_heads, size])
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
        y = op.Reshape(op.Transpose(y, perm=[0, 3, 1, 2, 4]), [0, 0, heads * size])
        return y, present[0], present[1]


def mask_bias(op: OpBuilder, attention_mask: ir.Value, position_ids: ir.Value) -> MaskBias:
    """The bias from ``attention_mask`` int64 [B, total]; ``position_ids`` [.., S] tells the number of new tokens."""
    length, total = op.Squeeze(op.Shape(position_ids, start=-1)), op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    token = op.Unsqueeze(op.Range(op.Sub(total, length), total, 1), [1])  # [S, 1], counted from the cache's beginning
    causal = op.LessOrEqual(op.Range(0, total, 1), token)  # [S, total]
    valid = op.Cast(op.Unsqueeze(attention_mask, [1, 2, 3]), to=ir.DataType.BOOL)  # [B, 1, 1, 1, total]
    # not -∞, which would make NaNs of the row of a pad that may attend to nothing
    return MaskBias(op.Where(op.And(causal, valid), 0.0, -1e30))


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
        self.heads, self.kv_heads, self.head_dim = num_attention_heads, num_key_value_heads, head_dim
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.sizes = [q_size, kv_size, kv_size]
        stacked = list(zip(("q_proj", "k_proj", "v_proj"), self.sizes, strict=True))
        self.qkv_proj = Linear(hidden_size, sum(self.sizes), bias=qkv_bias, stacked=stacked)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias)

    def forward(
        self, op: OpBuilder, x: ir.Value, rope: Rope, attend: Attend, past: Past, pick: Pick
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        # a cache of 8 bits is written by the attention itself
        dtype = ops.FLOAT if past[0].dtype == ir.DataType.INT8 else ops.dtype_of(past[0])
        q, k, v = op.Split(self.qkv_proj(op, x), self.sizes, axis=-1, _outputs=3)  # [B, S, heads · D]
        q = self._place(op, q, self.q_norm, rope, self.heads)
        k = self._place(op, k, self.k_norm, rope, self.kv_heads)
        q, k, v = (ops.cast(op, t, dtype) for t in (q, k, v))
        key_weight = None if self.k_norm is None else self.k_norm.weight
        y, key, value = attend(op, q, k, v, past, self.heads, self.kv_heads, key_weight)
        return self.o_proj(op, pick(op, y)), key, value

    def _place(self, op: OpBuilder, x: ir.Value, norm: RMSNorm | None, rope: Rope, heads: int) -> ir.Value:
        """Normalize and rotate the heads of ``x``, in fp32."""
        x = ops.cast(op, x, ops.FLOAT)
        if norm is not None:
            split = norm(op, op.Reshape(x, [0, 0, heads, self.head_dim]))
            x = op.Reshape(split, [0, 0, heads * self.head_dim])
        return ops.rotary(op, x, rope.rows, rope.cos, rope.sin, heads)
