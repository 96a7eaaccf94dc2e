"""Qwen3-VL: a text decoder with norms on queries and keys and interleaved M-RoPE, and a vision encoder with DeepStack.

Source: Qwen3-VL technical report (arXiv:2511.21631); transformers' ``modeling_qwen3_vl.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.architectures.base import Architecture
from vlpack.architectures.hparams import VisionFacts, output_width
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.text import TextDecoder
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding, Linear
from vlpack.layers.mlp import ACTIVATIONS, VisionMLP, activation
from vlpack.layers.norm import LayerNorm
from vlpack.layers.rope import interleaved_axes
from vlpack.layers.vision import (
    PatchEmbed,
    VisionAttention,
    VisionBlock,
    axial_rope,
    axial_theta,
    bilinear_taps,
    check_heads,
    frames_of,
    patch_positions,
)
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER

LAYER_NORM_EPS = 1e-6
"""Epsilon of the vision encoder's norms, which the config does not contain."""

TEXT = "model.language_model"
"""Prefix of the decoder's tensors in the checkpoint."""


class PatchMerger(nn.Module):
    """A merger: joins ``m · m`` adjacent patches to one token of the decoder's width.

    It maps ``[frames, patches, H]`` to ``[tokens, out]``. The final merger normalizes each patch before joining them;
    DeepStack's mergers (``postshuffle_norm``) normalize the joined patches.
    """

    def __init__(self, hidden_size: int, merge: int, out_hidden_size: int, postshuffle_norm: bool) -> None:
        super().__init__()
        self.width = hidden_size * merge * merge
        self.postshuffle_norm, self.merge = postshuffle_norm, merge
        self.norm = LayerNorm(self.width if postshuffle_norm else hidden_size, LAYER_NORM_EPS)
        self.linear_fc1 = Linear(self.width, self.width, bias=True)
        self.linear_fc2 = Linear(self.width, out_hidden_size, bias=True, role="output")

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        if self.postshuffle_norm:
            x = self.norm(op, op.Reshape(x, [-1, self.width]))
        else:
            x = op.Reshape(self.norm(op, x), [-1, self.width])
        # always an exact GELU, whatever activation the blocks have
        return self.linear_fc2(op, activation(op, self.linear_fc1(op, x), "gelu"))

    def channels(self) -> list[NormChannels]:
        """The norm's channels, which can be rescaled within the weights (`vlpack.layers.channels`)."""
        return [NormChannels(self.norm, [self.linear_fc1], 1 if self.postshuffle_norm else self.merge**2)]


class VisionModel(nn.Module):
    """The vision encoder with DeepStack: pixels to image features with one extra feature per level.

    ``pixel_values [N, C·T·p·p]``, ``image_grid_thw [images, 3]`` → ``image_features [tokens, (1 + levels)·H]``.
    """

    def __init__(self, config: Section, dtype: ir.DataType, deepstack: SideChannel) -> None:
        super().__init__("model.visual")
        size, heads = check_heads(config, "hidden_size")
        self.size, self.heads, self.dtype, self.deepstack = size, heads, dtype, deepstack
        self.merge = config.integer("spatial_merge_size", high=16)
        self.theta = axial_theta(config)

        positions, out = config.integer("num_position_embeddings", high=1 << 24), config.integer("out_hidden_size")
        act, intermediate = config.choice("hidden_act", ACTIVATIONS), config.integer("intermediate_size", high=1 << 20)
        self.side = int(positions**0.5)
        self.indexes = deepstack_indexes(config)
        self.patch_embed = PatchEmbed(config, size)
        self.pos_embed = Embedding(positions, size, role="table")
        self.blocks = nn.ModuleList(
            [
                VisionBlock(
                    (LayerNorm(size, LAYER_NORM_EPS), LayerNorm(size, LAYER_NORM_EPS)),
                    VisionAttention(size, heads),
                    VisionMLP(size, intermediate, act),
                )
                for _ in range(config.integer("depth", high=1024))
            ]
        )
        self.merger = PatchMerger(size, self.merge, out, postshuffle_norm=False)
        self.deepstack_merger_list = nn.ModuleList(
            [PatchMerger(size, self.merge, out, postshuffle_norm=True) for _ in self.indexes]
        )

    def forward(self, op: OpBuilder, pixel_values: ir.Value, image_grid_thw: ir.Value) -> list[ir.Value]:
        places = patch_positions(op, image_grid_thw, self.merge)
        frames = frames_of(op, image_grid_thw)
        rope = axial_rope(op, places, frames, self.size // self.heads, self.theta)
        x = self.patch_embed(op, pixel_values)  # [N, H]
        columns = bilinear_taps(op, places.column, places.width, self.side)
        for row, row_weight in bilinear_taps(op, places.row, places.height, self.side):
            for column, column_weight in columns:
                place = ops.typed(op.Add(op.Mul(row, self.side), column), ops.INT64, ["num_patches"])
                table = self.pos_embed(op, place)
                x = op.Add(x, op.Mul(table, op.Unsqueeze(op.Mul(row_weight, column_weight), [1])))
        x = op.Reshape(x, op.Concat(frames, [self.size], axis=0))
        x = ops.typed(x, ops.FLOAT, ["frames", "patches_per_frame", self.size])
        levels = []
        for index, block in enumerate(self.blocks):
            x = block(op, x, rope)
            if index in self.indexes:  # the levels are in order of depth; each has the merger at its index's place
                levels.append(self.deepstack_merger_list[self.indexes.index(index)](op, x))
        return [ops.cast(op, self.deepstack.join(op, self.merger(op, x), levels), self.dtype)]


def deepstack_indexes(config: Section) -> list[int]:
    """The indexes of the vision blocks whose output is a DeepStack level; the k-th index has the k-th merger.

    Raises:
        CheckpointError: an index is out of range or occurs twice.
    """
    depth = config.integer("depth", high=1024)
    indexes = config.integers("deepstack_visual_indexes", [8, 16, 24], high=depth - 1)
    if len(set(indexes)) != len(indexes):
        raise CheckpointError(f"{config.where}: deepstack_visual_indexes names a block twice: {indexes}.")
    return indexes


class Qwen3VL(Architecture):
    """``Qwen3VLForConditionalGeneration``, the models 2B, 4B, 8B, 32B; Instruct and Thinking."""

    models = "Qwen3-VL 2B, 4B, 8B, 32B; Instruct and Thinking"
    needs = "onnxruntime-genai 0.18 (DeepStack)"
    genai_type = "qwen3_vl"
    genai_text_type = "qwen3_vl_text"
    normalize_flag = "qwen3_vl"
    tasks: tuple[str, ...] = (GENERATE, EMBEDDING, RERANKER)
    text_defaults: Mapping[str, Any] = {"head_dim": 128}
    """Default values of this family, for configs without them, that differ from those of other text models."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config)
        text = root.section("text_config").with_defaults(self.text_defaults)
        self.vision_config = root.section("vision_config")
        bias = text.flag("attention_bias", False)
        self.decoder = TextDecoder.read(
            root,
            text,
            prefix=TEXT,
            qk_norm=True,
            qkv_bias=bias,
            o_bias=bias,
            theta=500000.0,
            mrope_layout=interleaved_axes,
            sections=(24, 20, 20),
        )
        self.vision = VisionFacts.read(root, self.vision_config)
        output_width(self.vision_config, "out_hidden_size", self.text)  # only for its check
        self.deepstack_levels = len(deepstack_indexes(self.vision_config))

    def vision_model(self, options: GraphOptions) -> nn.Module:
        return VisionModel(self.vision_config, options.dtype, self.deepstack)
