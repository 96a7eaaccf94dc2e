"""Qwen2.5-VL: Qwen2-VL's decoder, and a vision encoder with RMS norms, SwiGLU and attention within windows.

Source: Bai et al. 2025 (arXiv:2502.13923); transformers' ``modeling_qwen2_5_vl.py``.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.qwen2_vl import NORM_EPS, PatchMerger, Qwen2VL
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops
from vlpack.layers.mlp import ACTIVATIONS, GatedMLP
from vlpack.layers.norm import RMSNorm
from vlpack.layers.vision import (
    PatchEmbed,
    VisionAttention,
    VisionBlock,
    axial_rope,
    axial_theta,
    check_heads,
    frames_of,
    patch_positions,
    patch_size,
    windows_of,
)

VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
}
"""transformers' default values; a config may contain only the values that differ from them."""


class VisionModel(nn.Module):
    """The vision encoder: pixels to one feature vector per image token.

    ``pixel_values [N, C·T·p·p]``, ``image_grid_thw [images, 3]`` → ``image_features [tokens, H]``.
    """

    def __init__(self, config: Section, out: int, dtype: ir.DataType) -> None:
        super().__init__("model.visual")
        self.size, self.heads = check_heads(config, "hidden_size")
        self.dtype, self.theta = dtype, axial_theta(config)
        self.merge = config.integer("spatial_merge_size", 2, high=16)
        depth, intermediate = config.integer("depth", high=1024), config.integer("intermediate_size")
        self.full = config.integers("fullatt_block_indexes", [7, 15, 23, 31], high=1024)
        self.window = window_side(config, self.merge)
        act = config.choice("hidden_act", ACTIVATIONS, "silu")
        self.patch_embed = PatchEmbed(config, self.size, bias=False)
        self.blocks = nn.ModuleList(
            [
                VisionBlock(
                    (RMSNorm(self.size, NORM_EPS), RMSNorm(self.size, NORM_EPS)),
                    VisionAttention(self.size, self.heads),
                    GatedMLP(self.size, intermediate, act, bias=True),
                )
                for _ in range(depth)
            ]
        )
        self.merger = PatchMerger(RMSNorm(self.size, NORM_EPS), self.size, self.merge, out)

    def forward(self, op: OpBuilder, pixel_values: ir.Value, image_grid_thw: ir.Value) -> list[ir.Value]:
        places = patch_positions(op, image_grid_thw, self.merge)
        frames = frames_of(op, image_grid_thw)
        rope = axial_rope(op, places, frames, self.size // self.heads, self.theta)
        windows = windows_of(op, places, frames, self.window)
        x = op.Reshape(self.patch_embed(op, pixel_values), op.Concat(frames, [self.size], axis=0))
        x = ops.typed(x, ops.FLOAT, ["frames", "patches_per_frame", self.size])
        for index, block in enumerate(self.blocks):
            x = block(op, x, rope, None if index in self.full else windows)
        return [ops.cast(op, self.merger(op, x), self.dtype)]


def window_side(config: Section, merge: int) -> int:
    """The side of an attention window in patches: a whole number of merged tokens.

    Raises:
        CheckpointError: the window is smaller than one token.
    """
    side = config.integer("window_size", 112, high=1 << 16) // merge // patch_size(config) * merge
    if side < merge:
        raise CheckpointError(f"{config.where}: window_size is smaller than one token.")
    return side


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``, the models 3B, 7B, 32B, 72B."""

    models = "Qwen2.5-VL 3B, 7B, 32B, 72B"
    vision_width = "out_hidden_size"
    vision_defaults = VISION_DEFAULTS

    def vision_model(self, options: GraphOptions) -> nn.Module:
        return VisionModel(self.vision_config, self.width, options.dtype)
