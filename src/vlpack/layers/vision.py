"""What Qwen's vision encoders share: where every patch lies, axial rotary angles, self-attention over a frame.

Patches come in merge-block order: the ``m × m`` patches that the merger joins to one token are neighbours. All of it
is computed from ``image_grid_thw`` in the graph, so one graph serves every grid. Frames of one call must have equal
numbers of patches (the runtime calls once per image otherwise); `frames_of` makes anything else a shape error, never a
wrong answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops
from vlpack.layers.linear import Linear
from vlpack.layers.rope import Rope, inverse_frequencies, tables


def patch_size(config: Section) -> int:
    """Side of a patch in pixels; transformers also writes it as a pair."""
    return _one(config, "patch_size")


def temporal_patch_size(config: Section) -> int:
    """Frames in a patch."""
    return _one(config, "temporal_patch_size")


def _one(config: Section, name: str) -> int:
    sizes = config.integers(name, low=1, high=256)
    if not sizes or any(size != sizes[0] for size in sizes):
        raise CheckpointError(f"{config.where}: '{name}' is {sizes}; only equal sides are supported.")
    return sizes[0]


def kernel_of(config: Section) -> list[int]:
    """A patch's channels, frames, height and width."""
    side = patch_size(config)
    return [config.integer("in_channels", 3, high=16), temporal_patch_size(config), side, side]


def pixels_of(config: Section) -> int:
    """The length of a flattened patch."""
    return int(np.prod(kernel_of(config)))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is a linear layer on flattened patches: [N, C·T·p·p] → [N, H]."""

    def __init__(self, config: Section, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        kernel = kernel_of(config)
        self.proj = Linear(pixels_of(config), hidden_size, bias=bias, source_shape=[hidden_size, *kernel])

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        return ops.cast(op, self.proj(op, pixel_values), ops.FLOAT)


class Patches(NamedTuple):
    """Each patch's place in its image, int64 [N]."""

    row: ir.Value
    column: ir.Value
    height: ir.Value  # of the patch's image, in patches
    width: ir.Value


def patch_places(op: OpBuilder, grid: ir.Value, merge: int) -> Patches:
    """Places of all patches of ``grid`` int64 [images, 3] (frames, height, width).

    Source: transformers' ``get_vision_interpolation_indices_and_weights``.
    """
    frames, height, width = (op.Squeeze(part, [1]) for part in op.Split(grid, axis=1, num_outputs=3, _outputs=3))
    counts = op.Mul(op.Mul(frames, height), width)  # [images]
    ends = op.CumSum(counts, 0)
    patch = op.Range(0, op.ReduceSum(counts, keepdims=0), 1)  # [N]
    # a patch belongs to the image whose end is the first beyond it: count the ends that it has passed
    passed = op.GreaterOrEqual(op.Unsqueeze(patch, [1]), op.Unsqueeze(ends, [0]))  # [N, images]
    image = op.ReduceSum(op.Cast(passed, to=ops.INT64), [1], keepdims=0)
    height, width = op.Gather(height, image), op.Gather(width, image)
    start = op.Gather(op.Sub(ends, counts), image)
    within = op.Mod(op.Sub(patch, start), op.Mul(height, width))  # in its frame
    block, inside = op.Div(within, merge * merge), op.Mod(within, merge * merge)
    blocks_wide = op.Div(width, merge)
    row = op.Add(op.Mul(op.Div(block, blocks_wide), merge), op.Div(inside, merge))
    column = op.Add(op.Mul(op.Mod(block, blocks_wide), merge), op.Mod(inside, merge))
    return Patches(row, column, height, width)


def frames_of(op: OpBuilder, grid: ir.Value) -> ir.Value:
    """The shape [frames, patches per frame] of a call, int64 [2].

    The largest frame's size is taken for all, so that reshaping to it fails unless every frame has just that size.
    """
    frames, height, width = op.Split(grid, axis=1, num_outputs=3, _outputs=3)
    largest = op.ReduceMax(op.Mul(height, width), [0], keepdims=0)  # [1]
    return op.Concat(op.ReduceSum(frames, [0], keepdims=0), largest, axis=0)


def axial_rope(op: OpBuilder, places: Patches, frames: ir.Value, head_dim: int, theta: float) -> Rope:
    """Angles of the two axes: the first half of the frequencies turns with the row, the second with the column.

    Source: transformers' ``Qwen3VLVisionRotaryEmbedding``.
    """
    inv_freq = ops.constant(op, inverse_frequencies(head_dim // 2, theta)[None, :])  # [1, D/4]
    by_axis = [
        op.Mul(op.Unsqueeze(ops.cast(op, axis, ops.FLOAT), [1]), inv_freq) for axis in (places.row, places.column)
    ]
    angles = op.Concat(*by_axis, axis=-1)  # [N, D/2]
    count = op.ReduceProd(frames, keepdims=0)
    return tables(op, angles, op.Reshape(op.Range(0, count, 1), frames))


class VisionAttention(nn.Module):
    """Full attention among the patches of one frame; ``x [frames, patches, H]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=True)
        self.proj = Linear(hidden_size, hidden_size, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value, rope: Rope) -> ir.Value:
        qkv = self.qkv(op, x)
        q, k, v = op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)
        q, k = (
            ops.cast(op, ops.rotary(op, ops.cast(op, t, ops.FLOAT), rope.rows, rope.cos, rope.sin, self.heads), v.dtype)
            for t in (q, k)
        )
        return self.proj(op, ops.multi_head_attention(op, q, k, v, self.heads))


def bilinear_taps(op: OpBuilder, index: ir.Value, size: ir.Value, side: int) -> list[tuple[ir.Value, ir.Value]]:
    """The two table positions that ``index`` of ``size`` lies between, with their weights: (int64 [N], fp32 [N]) twice.

    The ends of the axis lie on the ends of the table (align_corners). Source: transformers'
    ``_interpolation_axis_taps_weights``.
    """
    steps = ops.cast(op, op.Max(op.Sub(size, 1), ops.constant(op, 1, np.int64)), ops.FLOAT)
    source = op.Div(op.Mul(ops.cast(op, index, ops.FLOAT), float(side - 1)), steps)
    floor = op.Floor(source)
    fraction = op.Sub(source, floor)
    low = ops.cast(op, floor, ops.INT64)
    high = op.Min(op.Add(low, 1), ops.constant(op, side - 1, np.int64))
    return [(low, op.Sub(1.0, fraction)), (high, fraction)]
