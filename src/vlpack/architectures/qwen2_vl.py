"""Qwen2-VL: Qwen2's decoder with chunked M-RoPE, and a vision encoder with layer norms and quick GELU.

Source: Wang et al. 2024 (arXiv:2409.12191); transformers' ``modeling_qwen2_vl.py``.
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
from vlpack.layers import ops
from vlpack.layers.channels import NormChannels
from vlpack.layers.mlp import ACTIVATIONS, VisionMLP
from vlpack.layers.norm import LayerNorm, RMSNorm
from vlpack.layers.rope import chunked_axes
from vlpack.layers.vision import (
    PatchEmbed,
    VisionAttention,
    VisionBlock,
    axial_rope,
    axial_theta,
    check_heads,
    frames_of,
    patch_positions,
)

NORM_EPS = 1e-6
"""Epsilon of the vision encoder's norms, which the config does not contain."""

TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""transformers' default values for the decoder: releases of 2024 and 2025 wrote only values that differ from them."""
VISION_DEFAULTS = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2}
"""transformers' default values for the vision encoder; a config may contain only the values that differ from them."""

RENAMED = {"visual.": "model.visual.", "model.layers.": "model.language_model.layers."} | {
    f"model.{name}.": f"model.language_model.{name}." for name in ("embed_tokens", "norm")
}
"""Maps the tensor-name prefixes of the Hub's checkpoints to the newer, nested ones of transformers."""


class PatchMerger(nn.Module):
    """The merger: joins ``m · m`` adjacent patches to one token of the decoder's width.

    It maps ``[frames, patches, H]`` to ``[tokens, out]``.
    """

    def __init__(self, norm: LayerNorm | RMSNorm, size: int, merge: int, out: int) -> None:
        super().__init__()
        self.ln_q = norm
        self.width, self.merge = size * merge * merge, merge
        # the layers are named by their places in transformers' nn.Sequential; between them is an exact GELU
        self.mlp = VisionMLP(self.width, self.width, "gelu", out, names=("0", "2"), role="output")

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.mlp(op, op.Reshape(self.ln_q(op, x), [-1, self.width]))

    def channels(self) -> list[NormChannels]:
        """The norm's channels, which can be rescaled within the weights (`vlpack.layers.channels`)."""
        return [NormChannels(self.ln_q, self.mlp.readers, self.merge**2)]


class VisionModel(nn.Module):
    """The vision encoder: pixels to one feature vector per image token.

    ``pixel_values [N, C·T·p·p]``, ``image_grid_thw [images, 3]`` → ``image_features [tokens, H]``.
    """

    def __init__(self, config: Section, out: int, dtype: ir.DataType) -> None:
        super().__init__("model.visual")
        self.size, self.heads = check_heads(config, "embed_dim")
        self.dtype, self.theta = dtype, axial_theta(config)
        self.merge = config.integer("spatial_merge_size", 2, high=16)
        intermediate = self.size * config.integer("mlp_ratio", 4, high=64)
        act = config.choice("hidden_act", ACTIVATIONS, "quick_gelu")
        self.patch_embed = PatchEmbed(config, self.size, bias=False)
        depth = config.integer("depth", high=1024)
        self.blocks = nn.ModuleList(
            [
                VisionBlock(
                    (LayerNorm(self.size, NORM_EPS), LayerNorm(self.size, NORM_EPS)),
                    VisionAttention(self.size, self.heads),
                    VisionMLP(self.size, intermediate, act, names=("fc1", "fc2")),
                )
                for _ in range(depth)
            ]
        )
        self.merger = PatchMerger(LayerNorm(self.size, NORM_EPS), self.size, self.merge, out)

    def forward(self, op: OpBuilder, pixel_values: ir.Value, image_grid_thw: ir.Value) -> list[ir.Value]:
        places = patch_positions(op, image_grid_thw, self.merge)
        frames = frames_of(op, image_grid_thw)
        rope = axial_rope(op, places, frames, self.size // self.heads, self.theta)
        x = op.Reshape(self.patch_embed(op, pixel_values), op.Concat(frames, [self.size], axis=0))
        x = ops.typed(x, ops.FLOAT, ["frames", "patches_per_frame", self.size])
        for block in self.blocks:
            x = block(op, x, rope)
        return [ops.cast(op, self.merger(op, x), self.dtype)]


def decoder_settings(root: Section) -> Section:
    """The decoder's settings from the top level of a config, where the Hub's configs have them.

    ``original_max_position_embeddings`` is left out, because transformers does not move it into the text config.
    """
    apart = "original_max_position_embeddings"
    return Section({name: value for name, value in root.values.items() if name != apart}, root.where)


class Qwen2VL(Architecture):
    """``Qwen2VLForConditionalGeneration``, the models 2B, 7B, 72B."""

    models = "Qwen2-VL 2B, 7B, 72B"
    # the runtime refuses the type qwen2_vl; image inputs and outputs are the same as Qwen2.5-VL's
    genai_type = "qwen2_5_vl"
    genai_text_type = "qwen2_5_vl_text"
    normalize_flag = "qwen2_5_vl"
    renamed = RENAMED
    vision_width = "hidden_size"
    vision_defaults: Mapping[str, Any] = VISION_DEFAULTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config)
        text = root.section("text_config") if "text_config" in root else decoder_settings(root)
        text = text.with_defaults(TEXT_DEFAULTS)
        self.vision_config = root.section("vision_config").with_defaults(self.vision_defaults)
        self.decoder = TextDecoder.read(
            root,
            text,
            prefix="model.language_model",
            qk_norm=False,
            qkv_bias=True,
            o_bias=False,
            theta=1000000.0,
            eps=1e-5,
            mrope_layout=chunked_axes,
            sections=(16, 24, 24),
        )
        self.vision = VisionFacts.read(root, self.vision_config)
        self.width = output_width(self.vision_config, self.vision_width, self.text)

    def vision_model(self, options: GraphOptions) -> nn.Module:
        return VisionModel(self.vision_config, self.width, options.dtype)
