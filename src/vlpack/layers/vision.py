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

from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels, RowChannels, readers_of, value_channels
from vlpack.layers.linear import Linear, Stored
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


def check_heads(config: Section, size_name: str) -> tuple[int, int]:
    """The encoder's width and heads; every head's half is turned by rows and half by columns.

    Raises:
        CheckpointError: the width cannot be shared out so.
    """
    size, heads = config.integer(size_name, high=1 << 16), config.integer("num_heads", high=1 << 10)
    if size % (heads * 4):
        raise CheckpointError(f"{config.where}: {size_name} {size} is not a multiple of 4 · num_heads ({heads}).")
    return size, heads


def axial_theta(config: Section) -> float:
    """Theta of the encoder's rotary embedding; configs of transformers 4 leave it away."""
    rope = config.section("rope_parameters", required=False)
    rope.choice("rope_type", ["axial"], "axial")
    return rope.number("rope_theta", 10000.0)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is a linear layer on flattened patches: [N, C·T·p·p] → [N, H]."""

    def __init__(self, config: Section, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        kernel = kernel_of(config)
        shape = [hidden_size, *kernel]
        self.proj = Linear(pixels_of(config), hidden_size, bias=bias, source_shape=shape, role="patches")

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


class Windows(NamedTuple):
    """Squares of patches that attend among themselves; those at the edges have empty slots."""

    slot_of_patch: ir.Value  # int64 [frames, patches]
    patch_of_slot: ir.Value  # int64 [windows, slots]; the number of patches where a slot is empty
    is_patch: ir.Value  # int32 [windows, slots]

    def gather(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """``[frames, patches, H] → [windows, slots, H]``, zeros in empty slots."""
        size = ops.shape_of(x)[-1]
        rows = op.Pad(op.Reshape(x, [-1, size]), [0, 0, 1, 0])
        return ops.typed(op.Gather(rows, self.patch_of_slot, axis=0), ops.dtype_of(x), ["windows", "slots", size])

    def scatter(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """``[windows, slots, H] → [frames, patches, H]``."""
        size = ops.shape_of(x)[-1]
        y = op.Gather(op.Reshape(x, [-1, size]), self.slot_of_patch, axis=0)
        return ops.typed(y, ops.dtype_of(x), ["frames", "patches_per_frame", size])


def windows_of(op: OpBuilder, places: Patches, frames: ir.Value, side: int) -> Windows:
    """Windows of ``side · side`` patches, counted from the top left corner of every frame.

    Source: transformers' ``get_vision_window_index``, which reorders the patches; attention does not care for their
    order, so here they are only gathered for it.
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
    """Attention among the patches of one frame, or of one window of it; ``x [frames, patches, H]``."""

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
        """What multiplies the module's input."""
        return [self.qkv]

    def channels(self) -> list[RowChannels]:
        """See `vlpack.layers.channels`."""
        return [value_channels(self.qkv, self.proj, self.heads, self.heads, self.proj.cols // self.heads)]


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward; the residual stream ``x [frames, patches, H]`` stays in fp32."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: VisionAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = attention
        self.mlp = mlp

    def forward(self, op: OpBuilder, x: ir.Value, rope: Rope, windows: Windows | None = None) -> ir.Value:
        x = op.Add(x, ops.cast(op, self.attn(op, self.norm1(op, x), rope, windows), ops.FLOAT))
        return op.Add(x, ops.cast(op, self.mlp(op, self.norm2(op, x)), ops.FLOAT))

    def channels(self) -> list[NormChannels]:
        """See `vlpack.layers.channels`."""
        return [NormChannels(self.norm1, self.attn.readers), NormChannels(self.norm2, readers_of(self.mlp))]


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
