"""Gated DeltaNet: linear attention with a state of constant size instead of a key/value cache.

A layer keeps two states per sequence: the last inputs of its causal convolution, and for every value head a matrix
``S [key_size, value_size]`` that each token changes by the gated delta rule

    S ← exp(g) · S;    S ← S + k · β · (v - Sᵀ k)ᵀ;    output = Sᵀ q / sqrt(key_size)

where q and k are normalized to length 1, ``g = -exp(A_log) · softplus(a + dt_bias)`` and ``β = sigmoid(b)``. Sources:
Yang et al. 2024 (arXiv:2412.06464); transformers' ``Qwen3_5GatedDeltaNet``.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.attention import AttentionBackend, Past, SelectTokens
from vlpack.layers.channels import NormChannels
from vlpack.layers.linear import Linear, Stored
from vlpack.layers.mlp import activation
from vlpack.layers.norm import NormWeight, rms_norm

L2_EPS = 1e-6
"""Epsilon in the normalization of queries and keys to length 1, which the config does not contain."""


@dataclass(frozen=True)
class DeltaNetSizes:
    """The sizes of a linear-attention layer.

    Args:
        key_heads: number of query heads, and of key heads.
        value_heads: number of value heads, a multiple of ``key_heads``: neighbours share a key head.
        key_size: channels of a query or key head.
        value_size: channels of a value head.
        kernel: number of tokens that the convolution sees.
        grouped: whether the checkpoint has one projection for queries, keys, values and z, and one for b and a, whose
            rows are grouped by key head (Qwen3-Next).
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int
    grouped: bool = False

    @property
    def key_width(self) -> int:
        """Number of channels of all queries, and of all keys."""
        return self.key_heads * self.key_size

    @property
    def value_width(self) -> int:
        """Number of channels of all values."""
        return self.value_heads * self.value_size

    @property
    def channels(self) -> int:
        """Number of channels of the convolution: those of queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a sequence's states, by the names that the runtime uses for them."""
        return {
            "conv_state": (self.channels, self.kernel - 1),
            "recurrent_state": (self.value_heads, self.key_size, self.value_size),
        }


class Kernel(nn.Module):
    """The fp32 kernel ``[C, 1, K]`` of a depthwise convolution."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([channels, 1, size], name="weight")

    def forward(self, op: OpBuilder) -> ir.Value:
        return self.weight


class GatedDeltaNet(nn.Module):
    """A linear-attention layer: projections, causal convolution, gated delta rule, gated norm, output projection.

    Everything between the projections is fp32 in every precision, because errors of gates and states add up over a
    sequence. Modules are named as in the checkpoint, except that ``in_proj_b`` and ``in_proj_a`` are one matrix,
    ``in_proj_ba``, which is its name in Qwen3-Next too.
    """

    place = "linear_attn"

    def __init__(self, hidden_size: int, sizes: DeltaNetSizes, eps: float, hidden_act: str) -> None:
        super().__init__()
        self.sizes, self.eps, self.hidden_act = sizes, eps, hidden_act
        heads = sizes.value_heads
        if sizes.grouped:
            self.in_proj_qkvz = Linear(hidden_size, sizes.channels + sizes.value_width)
        else:
            self.in_proj_qkv = Linear(hidden_size, sizes.channels)
            self.in_proj_z = Linear(hidden_size, sizes.value_width)
        stacked = [] if sizes.grouped else [("in_proj_b", heads), ("in_proj_a", heads)]
        self.in_proj_ba = Linear(hidden_size, 2 * heads, stacked=stacked, role="gate")
        self.conv1d = Kernel(sizes.channels, sizes.kernel)
        self.A_log = nn.Parameter([heads], name="A_log")
        self.dt_bias = nn.Parameter([heads], name="dt_bias")
        self.norm = NormWeight(sizes.value_size)
        self.out_proj = Linear(sizes.value_width, hidden_size)

    def forward(
        self, op: OpBuilder, x: ir.Value, backend: AttentionBackend, past: Past, select_tokens: SelectTokens
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Returns the outputs of the tokens that ``select_tokens`` keeps, and both states after all tokens.

        ``past`` has the states before the call: ``[B, C, K - 1]`` and ``[B, value_heads, key_size, value_size]``.
        """
        sizes = self.sizes
        qkv, z, b, a = self._project(op, x)
        mixed, conv_state = self._convolve(op, qkv, past[0])
        widths = [sizes.key_width, sizes.key_width, sizes.value_width]
        q, k, v = op.Split(mixed, widths, axis=-1, _outputs=3)
        g, beta = ops.linear_attention_gate(op, a, self.dt_bias, op.Neg(op.Exp(self.A_log)), b)
        q, k = self._unit(op, q), self._unit(op, k)
        y, state = ops.linear_attention(op, q, k, v, past[1], g, beta, sizes.key_heads, sizes.value_heads)
        y, z = select_tokens(op, y), select_tokens(op, z)
        return self.out_proj(op, self._gated_norm(op, y, z)), conv_state, state

    def _project(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values joined ``[B, S, C]``, z ``[B, S, heads · D]``, b and a ``[B, S, heads]``; fp32."""
        sizes, projected = self.sizes, [ops.cast(op, reader(op, x), ops.FLOAT) for reader in self.readers]
        if not sizes.grouped:
            qkv, z, ba = projected
            b, a = op.Split(ba, [sizes.value_heads, sizes.value_heads], axis=-1, _outputs=2)
            return qkv, z, b, a
        count = sizes.value_heads // sizes.key_heads  # number of value heads that share a key head
        values = count * sizes.value_size
        q, k, v, z = self._by_key_head(op, projected[0], [sizes.key_size, sizes.key_size, values, values])
        b, a = self._by_key_head(op, projected[1], [count, count])
        return op.Concat(q, k, v, axis=-1), z, b, a

    def _by_key_head(self, op: OpBuilder, x: ir.Value, parts: list[int]) -> list[ir.Value]:
        """Splits ``x [B, S, groups · sum(parts)]``; each result joins one part of all groups."""
        groups = op.Reshape(x, [0, 0, self.sizes.key_heads, sum(parts)])
        split = op.Split(groups, parts, axis=-1, _outputs=len(parts))
        return [op.Reshape(part, [0, 0, self.sizes.key_heads * n]) for part, n in zip(split, parts, strict=True)]

    def _convolve(self, op: OpBuilder, x: ir.Value, state: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The causal convolution of ``x [B, S, C]`` with its activation, and the state after it."""
        y, state = ops.causal_convolution(op, op.Transpose(x, perm=[0, 2, 1]), self.conv1d(op), state)
        return activation(op, op.Transpose(y, perm=[0, 2, 1]), self.hidden_act), state

    def _unit(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Queries or keys ``[B, S, heads · D]`` with every head normalized: ``x / sqrt(sum(x²) + ε)``."""
        heads, size = self.sizes.key_heads, self.sizes.key_size
        # an RMS norm whose weight and epsilon turn the mean of squares into their sum
        weight = ops.constant(op, [size**-0.5] * size)
        y = rms_norm(op, op.Reshape(x, [0, 0, heads, size]), weight, L2_EPS / size)
        return op.Reshape(y, [0, 0, heads * size])

    def _gated_norm(self, op: OpBuilder, x: ir.Value, z: ir.Value) -> ir.Value:
        """RMS norm of each head of ``x [B, S, heads · D]``, times the norm's weight ``[D]`` and the SiLU of z."""
        # onnxruntime's GatedRMSNorm takes thirty times as long on the CPU: it computes one exponential at a time
        heads, size = self.sizes.value_heads, self.sizes.value_size
        y = rms_norm(op, op.Reshape(x, [0, 0, heads, size]), self.norm(op), self.eps)
        return op.Mul(op.Reshape(y, [0, 0, heads * size]), activation(op, z, "silu"))

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        if self.sizes.grouped:
            return [self.in_proj_qkvz, self.in_proj_ba]
        return [self.in_proj_qkv, self.in_proj_z, self.in_proj_ba]

    def channels(self) -> list[NormChannels]:
        """The channels that can be rescaled within the weights (`vlpack.layers.channels`): those of the gated norm.

        The values' channels are not among them, because the convolution's activation is not linear.
        """
        return [NormChannels(self.norm, [self.out_proj], self.sizes.value_heads)]
