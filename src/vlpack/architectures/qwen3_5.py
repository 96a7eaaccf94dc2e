"""Qwen3.5 and Qwen3.6: decoders with linear attention in most layers and full attention in the others.

They have Qwen3-VL's vision encoder without DeepStack, or none. Source: transformers' ``modeling_qwen3_5.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxscript import nn

from vlpack.architectures.base import Architecture
from vlpack.architectures.hparams import VisionFacts, output_width
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.qwen3_vl import TEXT, VisionModel
from vlpack.architectures.text import TextDecoder
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers.delta_net import DeltaNetSizes
from vlpack.layers.rope import MropeLayout, interleaved_axes
from vlpack.quantize.policy import STATE_PROVIDERS

LINEAR, FULL = "linear_attention", "full_attention"
"""Names of the two kinds of layers in ``layer_types``."""

TEXT_DEFAULTS: Mapping[str, Any] = {"head_dim": 256, "num_key_value_heads": 4}
"""Values of this family for configs that lack them, where they differ from those of other text models."""

IDS: Mapping[str, int] = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
}
"""Ids of the tokens for and around images, for configs that lack them."""

DRAFTS = {"mtp.*": "a layer that drafts tokens, which transformers ignores and the runtime cannot run on the CPU"}


def read_hybrid(
    root: Section,
    text: Section,
    *,
    prefix: str,
    mrope_layout: MropeLayout | None = interleaved_axes,
    grouped: bool = False,
) -> TextDecoder:
    """Reads the settings of a decoder with linear and full attention from a config.json and its text part.

    Args:
        root: the whole config.
        text: the part with the decoder's sizes; the whole config if it is flat.
        prefix: prefix of the decoder's tensors in the checkpoint.
        mrope_layout: how M-RoPE's three axes share the frequencies; None if the first axis has them all.
        grouped: whether the projections of linear attention are grouped (`DeltaNetSizes`).

    Raises:
        CheckpointError: a value is missing or not supported.
    """
    bias = text.flag("attention_bias", False)
    decoder = TextDecoder.read(
        root,
        text,
        prefix=prefix,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        theta=10000.0,
        mrope_layout=mrope_layout,
        sections=(11, 11, 10),
        rotated_share=0.25,
    )
    if not text.flag("attn_output_gate", True):
        raise CheckpointError(f"{text.where}: attention without an output gate (attn_output_gate) is not supported.")
    text.choice(
        "output_gate_type", ("swish", "silu"), "silu"
    )  # activation of the gated norm; both names mean the same function
    layers, sizes = linear_layers(text, decoder.facts.num_hidden_layers), read_sizes(text, grouped=grouped)
    # the runtime gives such models three rows of positions, whether they use them or not
    return replace(decoder.with_linear_layers(layers, sizes), norm_offset=1.0, output_gate=True, position_axes=3)


def linear_layers(text: Section, count: int) -> list[int]:
    """The indices of those of a model's ``count`` layers that have linear attention.

    Raises:
        CheckpointError: a layer is of another kind, or none has full attention.
    """
    if "layer_types" in text:
        kinds = text.words("layer_types", (LINEAR, FULL), count)
    else:
        interval = text.integer("full_attention_interval", 4)
        kinds = [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(count)]
    if FULL not in kinds:  # the runtime counts tokens by the key/value cache
        raise CheckpointError(f"{text.where}: no layer has full attention, which is not supported.")
    return [layer for layer, kind in enumerate(kinds) if kind == LINEAR]


def read_sizes(text: Section, *, grouped: bool = False) -> DeltaNetSizes:
    """Reads the sizes of linear attention; ``grouped`` is as in `DeltaNetSizes`.

    Raises:
        CheckpointError: a size is out of range or does not fit another.
    """
    sizes = DeltaNetSizes(
        key_heads=text.integer("linear_num_key_heads", 16, high=1 << 12),
        value_heads=text.integer("linear_num_value_heads", 32, high=1 << 12),
        key_size=text.integer("linear_key_head_dim", 128, high=1 << 12),
        value_size=text.integer("linear_value_head_dim", 128, high=1 << 12),
        kernel=text.integer("linear_conv_kernel_dim", 4, low=2, high=1 << 8),
        grouped=grouped,
    )
    if sizes.value_heads % sizes.key_heads:
        raise CheckpointError(
            f"{text.where}: linear_num_value_heads ({sizes.value_heads}) is not a multiple of linear_num_key_heads "
            f"({sizes.key_heads})."
        )
    return sizes


class Qwen35Text(Architecture):
    """``Qwen3_5ForCausalLM``: a model that is only the decoder."""

    models = "Qwen3.5 and Qwen3.6, text only"
    needs = "onnxruntime 1.31"
    providers = STATE_PROVIDERS
    genai_type = genai_text_type = "qwen3_5_text"
    ignored: Mapping[str, str] = {**DRAFTS, "model.visual.*": "the vision encoder, because this is a text model"}
    text_defaults: Mapping[str, Any] = TEXT_DEFAULTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config).with_defaults(self.text_defaults)
        self.decoder = read_hybrid(root, root, prefix="model")


class Qwen35(Architecture):
    """``Qwen3_5ForConditionalGeneration``: the models 0.8B, 2B, 4B, 9B and 27B, with vision."""

    models = "Qwen3.5 0.8B, 2B, 4B, 9B, 27B; Qwen3.6 27B"
    needs = "onnxruntime 1.31"
    providers = STATE_PROVIDERS
    genai_type = "qwen3_5"
    genai_text_type = "qwen3_5_text"
    normalize_flag = "qwen3_vl"
    ignored: Mapping[str, str] = DRAFTS
    text_defaults: Mapping[str, Any] = TEXT_DEFAULTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config).with_defaults(IDS)
        # transformers ignores DeepStack in this family, whatever the config says; published configs have []
        vision = {**root.section("vision_config").values, "deepstack_visual_indexes": []}
        self.vision_config = Section(vision, f"{root.where}: vision_config")
        self.decoder = read_hybrid(root, root.section("text_config").with_defaults(self.text_defaults), prefix=TEXT)
        self.vision = VisionFacts.read(root, self.vision_config)
        output_width(self.vision_config, "out_hidden_size", self.text)  # raises an error if the width does not fit

    def vision_model(self, options: GraphOptions) -> nn.Module:
        return VisionModel(self.vision_config, options.dtype, self.deepstack)
