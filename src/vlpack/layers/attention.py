"""Causal self-attention of the text decoders, over a key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.linear import Linear
from vlpack.layers.norm import RMSNorm
from vlpack.layers.rope import Rope


class CacheLengths(NamedTuple):
    """What GroupQueryAttention asks of the attention mask."""

    seqlens_k: ir.Value  # int32 [B]: valid keys - 1
    total: ir.Value  # int32 scalar: width of the mask


def cache_lengths(op: OpBuilder, attention_mask: ir.Value) -> CacheLengths:
    """Lengths from ``attention_mask`` int64 [B, total], ones before zeros."""
    valid = op.ReduceSum(attention_mask, [1], keepdims=0)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    return CacheLengths(op.Cast(op.Sub(valid, 1), to=ops.INT32), op.Cast(total, to=ops.INT32))


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
        self, op: OpBuilder, x: ir.Value, rope: Rope, lengths: CacheLengths, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        dtype = ops.dtype_of(past[0])
        q, k, v = op.Split(self.qkv_proj(op, x), self.sizes, axis=-1, _outputs=3)  # [B, S, heads · D]
        q = self._place(op, q, self.q_norm, rope, self.heads)
        k = self._place(op, k, self.k_norm, rope, self.kv_heads)
        q, k, v = (ops.cast(op, t, dtype) for t in (q, k, v))
        y, key, value = ops.group_query_attention(op, q, k, v, past, lengths, self.heads, self.kv_heads)
        return self.o_proj(op, y), key, value

    def _place(self, op: OpBuilder, x: ir.Value, norm: RMSNorm | None, rope: Rope, heads: int) -> ir.Value:
        """Normalize and rotate the heads of ``x``, in fp32."""
        x = ops.cast(op, x, ops.FLOAT)
        if norm is not None:
            split = norm(op, op.Reshape(x, [0, 0, heads, self.head_dim]))
            x = op.Reshape(split, [0, 0, heads * self.head_dim])
        return ops.rotary(op, x, rope.rows, rope.cos, rope.sin, heads)
