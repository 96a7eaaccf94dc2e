"""The rotation of a matrix's input while the graph runs, for matrices where it cannot be folded into the weights.

`vlpack.quantize.rotate` explains the purpose of rotations.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops
from vlpack.quantize.rotate import rotation_matrix


def rotate(op: OpBuilder, x: ir.Value, size: int, *, back: bool = False) -> ir.Value:
    """Multiply each block of ``size`` values in the last dimension of ``x [.., cols]`` by the rotation matrix.

    Args:
        op: the graph under construction.
        x: fp32 or fp16 values of a known rank.
        size: size of the blocks, a divisor of ``cols``; 1 changes nothing.
        back: whether to multiply by the transpose instead, which undoes the rotation.
    """
    if size == 1:
        return x
    dtype, shape = ops.dtype_of(x), ops.shape_of(x)
    matrix = rotation_matrix(size)
    name = f"rotation_{size}{'_back' if back else ''}_{dtype.name.lower()}"
    values = ops.named_constant(op, name, (matrix.T if back else matrix).astype(dtype.numpy()))
    cols = shape[-1]
    assert isinstance(cols, int), "the size of the rotated dimension is not known"
    kept = [0] * (len(shape) - 1)
    blocks = op.MatMul(op.Reshape(x, [*kept, cols // size, size]), values)
    return ops.typed(op.Reshape(blocks, [*kept, cols]), dtype, shape)
