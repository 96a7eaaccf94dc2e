"""RMS and layer normalization, always in fp32: ``x`` is cast to fp32, and the next layer casts its input back."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """RMS normalization of ``x`` (`RMSNorm`), with a ``weight`` that is broadcast to ``x``."""
    x = ops.cast(op, x, ops.FLOAT)
    if op.version is not None and op.version >= 23:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)
    # older operator sets lack the operator; onnxruntime fuses these nodes when it loads the graph
    mean_square = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean_square, eps))), weight)


class RMSNorm(nn.Module):
    """RMS normalization ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension; the result is fp32.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467); transformers' ``Qwen3VLTextRMSNorm``.

    Args:
        size: size of the last dimension.
        eps: epsilon.
        offset: number that is added to the checkpoint's weights when they are written. Some models store the weight's
            difference from 1 (``Qwen3_5RMSNorm``).
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], name="weight")
        self.eps, self.offset = eps, offset

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return rms_norm(op, x, self.weight, self.eps)


class NormWeight(nn.Module):
    """The weight of an RMS norm that another module computes; this module only gives the tensor its name.

    ``offset`` is that of `RMSNorm`.
    """

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], name="weight")
        self.offset = offset

    def forward(self, op: OpBuilder) -> ir.Value:
        return self.weight


class LayerNorm(nn.Module):
    """Layer normalization ``(x - mean) / sqrt(var + eps) · weight + bias`` over the last dimension; result in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], name="weight")
        self.bias = nn.Parameter([size], name="bias")
        self.eps = eps

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = ops.cast(op, x, ops.FLOAT)
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.eps)
