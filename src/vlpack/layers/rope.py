"""Rotary position embedding, one formula for all: ``angle[s, f] = position[axis_of[f], s] · inv_freq[f]``.

``axis_of`` says which row of the positions turns frequency ``f``: all zeros in text models, runs of t, h, w in
Qwen2.x-VL (chunked), t h w t h w … in Qwen3-VL (interleaved). Source: Su et al. 2021 (arXiv:2104.09864); Qwen2-VL
(arXiv:2409.12191); transformers' ``Qwen3VLTextRotaryEmbedding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops


class Rope(NamedTuple):
    """Angles as the fused operator takes them: tables of a row per token, and each token's row."""

    cos: ir.Value  # [B · S, D / 2]
    sin: ir.Value  # [B · S, D / 2]
    rows: ir.Value  # int64 [B, S]


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """``theta ** (-2 i / dim)`` for i < dim / 2, float32 [dim / 2]."""
    # the exponent is rounded to fp32 first, as torch does it
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies: np.ndarray = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    return frequencies


def interleaved_axes(sections: Sequence[int]) -> np.ndarray:
    """Axis of each frequency in Qwen3-VL: t h w t h w …, and t again where h and w have used up their sections."""
    axes = np.zeros(sum(sections), np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def chunked_axes(sections: Sequence[int]) -> np.ndarray:
    """Axis of each frequency in Qwen2-VL and Qwen2.5-VL: runs of t, h and w."""
    return np.repeat(np.arange(len(sections)), sections)


def rope_section(text: Section) -> Section:
    """The rotary settings under either of their names: ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4).

    Raises:
        CheckpointError: a scaling that is not supported.
    """
    name = "rope_parameters" if "rope_parameters" in text else "rope_scaling"
    rope = text.section(name, required=False)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    # the first Qwen2-VL checkpoints call plain M-RoPE "mrope"
    if kind not in ("default", "mrope"):
        raise CheckpointError(
            f"{rope.where}: rope_type '{kind}' is not supported; vlpack would compute wrong positions.",
            "Use a checkpoint with rope_type 'default'.",
        )
    return rope


def angles_from_positions(op: OpBuilder, position_ids: ir.Value, axis_of: np.ndarray, inv_freq: np.ndarray) -> Rope:
    """Angles of ``position_ids`` int64 [axes, B, S]."""
    positions = ops.cast(op, position_ids, ops.FLOAT)
    by_frequency = op.Gather(positions, ops.constant(op, axis_of, np.int64), axis=0)  # [D/2, B, S]
    angles = op.Mul(op.Transpose(by_frequency, perm=[1, 2, 0]), ops.constant(op, inv_freq))  # [B, S, D/2]
    shape = op.Shape(position_ids, start=1)  # B, S
    count = op.ReduceProd(shape, keepdims=0)
    rows = ops.typed(op.Reshape(op.Range(0, count, 1), shape), ops.INT64, ["batch_size", "sequence_length"])
    return tables(op, op.Reshape(angles, [-1, len(inv_freq)]), rows)


def tables(op: OpBuilder, angles: ir.Value, rows: ir.Value) -> Rope:
    """Cosine and sine of ``angles`` [rows, D / 2], in fp32."""
    return Rope(op.Cos(angles), op.Sin(angles), rows)
