"""The layers that Qwen's vision encoders share: patch positions, axial rotary angles, self-attention within a frame.

Patches come in merge-block order: the ``m × m`` patches that the merger joins to one token are adjacent. The graph
computes all positions from ``image_grid_thw``, so one graph serves every grid. All frames of one call must have the
same number of patches (for other images the runtime calls once per image); `frames_of` turns anything else into a shape
error, never into a wrong result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels, RowChannels, readers_of, value_channels
from vlpack.layers.linear import Linear, Stored
from vlpack.layers.rope import Rope, inverse_frequencies, tables


def patch_size(config: Section) -> int:
    """The side of a patch in pixels; transformers also writes it as a pair."""
    return _one(config, "patch_size")


def temporal_patch_size(config: Section) -> int:
    """The number of frames in a patch."""
    return _one(config, "temporal_patch_size")


def _one(config: Section, name: str) -> int:
    sizes = config.integers(name, low=1, high=256)
    if not sizes or any(size != sizes[0] for size in sizes):
        raise CheckpointError(f"{config.where}: '{name}' is {sizes}; only equal sides are supported.")
    return sizes[0]


def kernel_of(config: Section) -> list[int]:
    """The shape of a patch: channels, frames, height and width."""
    side = patch_size(config)
    return [config.integer("in_channels", 3, high=16), temporal_patch_size(config), side, side]


def pixels_of(config: Section) -> int:
    """The number of values in a flattened patch."""
    return int(np.prod(kernel_of(config)))


def check_heads(config: Section, size_name: str) -> tuple[int, int]:
    """Read the encoder's width and number of heads.

    The row position rotates one half of every head and the column position the other half, so the width must be a
    multiple of 4 · heads.

    Raises:
        CheckpointError: the width is not such a multiple.
    """
    size, heads = config.integer(size_name, high=1 << 16), config.integer("num_heads", high=1 << 10)
    if size % (heads * 4):
        raise CheckpointError(f"{config.where}: {size_name} {size} is not a multiple of 4 · num_heads ({heads}).")
    return size, heads


def axial_theta(config: Section) -> float:
    """Theta of the encoder's rotary embedding; configs of transformers 4 do not contain it."""
    rope = config.section("rope_parameters", required=False)
    rope.choice("rope_type", ["axial"], "axial")
    return rope.number("rope_theta", 10000.0)


class PatchEmbed(nn.Module):
    """The patch embedding [N, C·T·p·p] → [N, H]: a convolution with stride = kernel, that is, a linear layer."""

    def __init__(self, config: Section, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        kernel = kernel_of(config)
        shape = [hidden_size, *kernel]
        self.proj = Linear(pixels_of(config), hidden_size, bias=bias, source_shape=shape, role="patches")

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        return ops.cast(op, self.proj(op, pixel_values), ops.FLOAT)


class PatchPositions(NamedTuple):
    """The position of each patch in its image, and the size of that image in patches; int64 [N] each."""

    row: ir.Value
    column: ir.Value
    height: ir.Value  # height of the patch's image
    width: ir.Value  # width of the patch's image


def patch_positions(op: OpBuilder, grid: ir.Value, merge: int) -> PatchPositions:
    """The positions of all patches of ``grid`` int64 [images, 3] (frames, height, width).

    Source: transformers' ``get_vision_interpolation_indices_and_weights``.
    """
    frames, height, width = (op.Squeeze(part, [1]) for part in op.Split(grid, axis=1, num_outputs=3, _outputs=3))
    counts = op.Mul(op.Mul(frames, height), width)  # [images]
    ends = op.CumSum(counts, 0)
    patch = op.Range(0, op.ReduceSum(counts, keepdims=0), 1)  # [N]
    # the index of a patch's image is the number of images that end at or before the patch
    passed = op.GreaterOrEqual(op.Unsqueeze(patch, [1]), op.Unsqueeze(ends, [0]))  # [N, images]
    image = op.ReduceSum(op.Cast(passed, to=ops.INT64), [1], keepdims=0)
    height, width = op.Gather(height, image), op.Gather(width, image)
    start = op.Gather(op.Sub(ends, counts), image)
    within = op.Mod(op.Sub(patch, start), op.Mul(height, width))  # index within the frame
    block, inside = op.Div(within, merge * merge), op.Mod(within, merge * merge)
    blocks_wide = op.Div(width, merge)
    row = op.Add(op.Mul(op.Div(block, blocks_wide), merge), op.Div(inside, merge))
    column = op.Add(op.Mul(op.Mod(block, blocks_wide), merge), op.Mod(inside, merge))
    return PatchPositions(row, column, height, width)


def frames_of(op: OpBuilder, grid: ir.Value) -> ir.Value:
    """The shape [frames, patches per frame] of a call's patches, int64 [2].

    The largest frame's size stands for all, so that reshaping to it fails unless every frame has exactly that size.
    """
    frames, height, width = op.Split(grid, axis=1, num_outputs=3, _outputs=3)
    largest = op.ReduceMax(op.Mul(height, width), [0], keepdims=0)  # [1]
    return op.Concat(op.ReduceSum(frames, [0], keepdims=0), largest, axis=0)


def axial_rope(op: OpBuilder, places: PatchPositions, frames: ir.Value, head_dim: int, theta: float) -> Rope:
    """Axial rotary angles: the first half of the frequencies depends on the patch's row, the second on its column.

    Source: transformers' ``Qwen3VLVisionRotaryEmbedding``.
    """
    inv_freq = ops.constant(op, inverse_frequencies(head_dim // 2, theta)[None, :])  # [1, D/4]
    by_axis = [
        op.Mul(op.Unsqueeze(ops.cast(op, axis, ops.FLOAT), [1]), inv_freq) for axis in (places.row, places.column)
    ]
    angles = op.Concat(*by_axis, axis=-1)  # [N, D/2]
    count = op.ReduceProd(frames, keepdims=0)
    return tables(op, angles, op.Reshape(op.Range(0, count, 1), frames))


class Windows(NamedTuple):
    """Square windows of patches for windowed attention; windows at the edges of a frame have empty slots."""

    slot_of_patch: ir.Value  # int64 [frames, patches]
    patch_of_slot: ir.Value  # int64 [windows, slots]; an empty slot has the number of patches
    is_patch: ir.Value  # int32 [windows, slots]: 1, or 0 for an empty slot

    def gather(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Sort patches into windows: ``[frames, patches, H] → [windows, slots, H]``, zeros in empty slots."""
        size = ops.shape_of(x)[-1]
        rows = op.Pad(op.Reshape(x, [-1, size]), [0, 0, 1, 0])
        return ops.typed(op.Gather(rows, self.patch_of_slot, axis=0), ops.dtype_of(x), ["windows", "slots", size])

    def scatter(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Put patches back from windows into frames: ``[windows, slots, H] → [frames, patches, H]``."""
        size = ops.shape_of(x)[-1]
        y = op.Gather(op.Reshape(x, [-1, size]), self.slot_of_patch, axis=0)
        return ops.typed(y, ops.dtype_of(x), ["frames", "patches_per_frame", size])


def windows_of(op: OpBuilder, places: PatchPositions, frames: ir.Value, side: int) -> Windows:
    """Windows of ``side · side`` patches, counted from the top left corner of every frame.

    Source: transformers' ``get_vision_window_index``, which reorders the patches for the whole encoder. Attention does
    not depend on their order, so here they are sorted into windows only for the attention itself.
    """

    def across(size: ir.Value) -> ir.Value:
        return op.Div(op.Add(size, side - 1), side)

    slots = side * side
    per_row = across(places.width)  # [N]
    per_frame = op.ReduceMax(op.Mul(per_row, across(places.height)), keepdims=0)
    patch = op.Range(0, op.ReduceProd(frames, keepdims=0), 1)  # [N]
    frame = op.Div(patch, op.Gather(frames, 1))
    window = op.Add(
        op.Mul(frame, per_frame), op.Add(op.Mul(op.Div(places.row, side), per_row), op.Div(places.column, side))
    )
    inside = op.Add(op.Mul(op.Mod(places.row, side), side), op.Mod(places.column, side))
    slot = op.Add(op.Mul(window, slots), inside)  # [N]
    count = op.Mul(op.Mul(op.Gather(frames, 0), per_frame), slots)
    empty = op.Expand(op.Size(patch), op.Unsqueeze(count, [0]))
    patch_of_slot = op.Reshape(op.ScatterElements(empty, slot, patch, axis=0), [-1, slots])
    is_patch = op.Cast(op.Less(patch_of_slot, op.Size(patch)), to=ops.INT32)
    return Windows(op.Reshape(slot, frames), patch_of_slot, is_patch)


class VisionAttention(nn.Module):
    """Self-attention among the patches of each frame, or of each window; ``x [frames, patches, H]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=True)
        self.proj = Linear(hidden_size, hidden_size, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value, rope: Rope, windows: Windows | None = None) -> ir.Value:
        qkv = self.qkv(op, x)
        q, k, v = op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)
        q, k = (
            ops.cast(op, ops.rotary(op, ops.cast(op, t, ops.FLOAT), rope.rows, rope.cos, rope.sin, self.heads), v.dtype)
            for t in (q, k)
        )
        if windows is None:
            return self.proj(op, ops.multi_head_attention(op, q, k, v, self.heads))
        q, k, v = (windows.gather(op, t) for t in (q, k, v))
        y = ops.multi_head_attention(op, q, k, v, self.heads, windows.is_patch)
        return self.proj(op, windows.scatter(op, y))

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        return [self.qkv]

    def channels(self) -> list[RowChannels]:
        """The channels that can be rescaled or rotated within the weights (`vlpack.layers.channels`)."""
        return [value_channels(self.qkv, self.proj, self.heads, self.heads, self.proj.cols // self.heads)]


class VisionBlock(nn.Module):
    """A block of the vision encoder: attention and feed-forward, each with a norm before it and a residual around it.

    The residual stream ``x [frames, patches, H]`` stays in fp32.
    """

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: VisionAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = attention
        self.mlp = mlp

    def forward(self, op: OpBuilder, x: ir.Value, rope: Rope, windows: Windows | None = None) -> ir.Value:
        x = op.Add(x, ops.cast(op, self.attn(op, self.norm1(op, x), rope, windows), ops.FLOAT))
        return op.Add(x, ops.cast(op, self.mlp(op, self.norm2(op, x)), ops.FLOAT))

    def channels(self) -> list[NormChannels]:
        """The channels that can be rescaled within the weights (`vlpack.layers.channels`)."""
        return [NormChannels(self.norm1, self.attn.readers), NormChannels(self.norm2, readers_of(self.mlp))]


def bilinear_taps(op: OpBuilder, index: ir.Value, size: ir.Value, side: int) -> list[tuple[ir.Value, ir.Value]]:
    """The two taps of a bilinear interpolation along one axis of a position table with ``side`` entries.

    The first and last patch of the axis lie on the first and last entry of the table (align_corners). Source:
    transformers' ``_interpolation_axis_taps_weights``.

    Args:
        op: the graph under construction.
        index: each patch's position on the axis, int64 [N].
        size: the image's size on that axis, in patches, int64 [N].
        side: number of entries of the table on that axis.

    Returns:
        two pairs of table indices, int64 [N], and weights, fp32 [N].
    """
    steps = ops.cast(op, op.Max(op.Sub(size, 1), ops.constant(op, 1, np.int64)), ops.FLOAT)
    source = op.Div(op.Mul(ops.cast(op, index, ops.FLOAT), float(side - 1)), steps)
    floor = op.Floor(source)
    fraction = op.Sub(source, floor)
    low = ops.cast(op, floor, ops.INT64)
    high = op.Min(op.Add(low, 1), ops.constant(op, side - 1, np.int64))
    return [(low, op.Sub(1.0, fraction)), (high, fraction)]
