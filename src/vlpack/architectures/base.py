"""What every architecture answers: its graphs, and the facts that the runtime's configuration needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxscript import nn

from vlpack.config import Section
from vlpack.deepstack import CHANNEL, SideChannel
from vlpack.errors import CheckpointError
from vlpack.layers.byte_codes import EXTRA
from vlpack.layers.embedding import ImageEmbedding
from vlpack.layers.vision import patch_size, pixels_of, temporal_patch_size
from vlpack.precision import OFFERED, PrecisionFacts
from vlpack.tasks import GENERATE

if TYPE_CHECKING:
    from vlpack.architectures.text import TextDecoder
    from vlpack.tensorfile import TensorInfo

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; symbolic dimensions are strings."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a package: a module whose ``forward(op, *inputs)`` returns its outputs in order."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def side(self) -> str:
        """``vision`` or ``text``: the first word of its weights' roles (`vlpack.precision`)."""
        return "vision" if self.name == "vision" else "text"


@dataclass(frozen=True)
class GraphOptions:
    """What passes between the graphs, and how tokens attend.

    Args:
        dtype: of embeddings, image features, cache and logits.
        last_logits: only the last token's logits, ``[B, 1, V]``.
        grouped_kernel: onnxruntime has its fused attention where the graphs will run (`has_grouped_kernel`).
        byte_cache: keys and values are kept in 8 bits (`vlpack.layers.byte_cache`).
    """

    dtype: ir.DataType = ir.DataType.FLOAT
    last_logits: bool = True
    grouped_kernel: bool = True
    byte_cache: bool = False

    def cache_of(self, text: TextFacts) -> tuple[ir.DataType, int]:
        """The cache's dtype and channels per head."""
        if self.byte_cache:
            return ir.DataType.INT8, text.head_size + EXTRA
        return self.dtype, text.head_size


@dataclass(frozen=True)
class TextFacts:
    """The decoder's sizes, as genai_config.json wants them."""

    hidden_size: int
    head_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    vocab_size: int
    context_length: int

    @classmethod
    def read(cls, config: Section) -> TextFacts:
        """From the text part of a config.json.

        Raises:
            CheckpointError: a size is missing, absurd or does not go with another.
        """
        heads = config.integer("num_attention_heads", high=1 << 12)
        kv_heads = config.integer("num_key_value_heads", heads, high=1 << 12)
        hidden_size = config.integer("hidden_size", high=1 << 20)
        head_size = config.integer("head_dim", hidden_size // heads, high=1 << 12)
        if heads % kv_heads:
            raise CheckpointError(
                f"{config.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
            )
        if head_size % 8:
            raise CheckpointError(f"{config.where}: head_dim is {head_size}; the runtime needs a multiple of 8.")
        return cls(
            hidden_size=hidden_size,
            head_size=head_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=config.integer("num_hidden_layers", high=1 << 12),
            vocab_size=config.integer("vocab_size", high=1 << 24),
            context_length=config.integer("max_position_embeddings", 32768),
        )


@dataclass(frozen=True)
class VisionFacts:
    """What the runtime's image handling needs: patch sizes, and the ids of the tokens around and for an image."""

    depth: int
    pixels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    tokens_per_second: float
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def read(cls, root: Section, vision: Section) -> VisionFacts:
        """From a config.json and its vision part; Qwen's ids where the config has none."""
        return cls(
            depth=vision.integer("depth", high=1024),
            pixels=pixels_of(vision),
            patch_size=patch_size(vision),
            temporal_patch_size=temporal_patch_size(vision),
            spatial_merge_size=vision.integer("spatial_merge_size", 2, high=16),
            tokens_per_second=vision.number("tokens_per_second", 2.0),
            image_token_id=root.integer("image_token_id", 151655, low=0),
            video_token_id=root.integer("video_token_id", 151656, low=0),
            vision_start_token_id=root.integer("vision_start_token_id", 151652, low=0),
            vision_end_token_id=root.integer("vision_end_token_id", 151653, low=0),
        )


class Architecture(ABC):
    """A model family with its config read. See docs/adding-an-architecture.md."""

    models: str
    """The published models, for people."""
    needs: str = ""
    """What they need beyond what every model does, likewise."""
    providers: tuple[str, ...] = tuple(OFFERED)
    """Execution providers that have the operators."""
    genai_type: str
    """``model.type`` in genai_config.json of the complete package."""
    genai_text_type: str
    """… and of the decoder that embeds by itself."""
    normalize_flag: str = ""
    """The attribute of the image processor's Normalize step that makes it write this family's patch layout."""
    tasks: tuple[str, ...] = (GENERATE,)
    """What its models can be for."""
    task: str = GENERATE
    """What this one is for; `architecture_of` sets it."""
    answers: tuple[int, int] | None = None
    """A reranker's ids of the tokens yes and no, likewise."""
    renamed: Mapping[str, str] = {}
    """Prefix of older checkpoints → today's, for tensors that were once named otherwise."""
    decoder: TextDecoder
    vision: VisionFacts | None = None
    """None for a text model."""
    deepstack: SideChannel

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read and check a config.json.

        Raises:
            CheckpointError: a value is missing or not supported.
        """

    def observe(self, tensors: Mapping[str, TensorInfo]) -> None:  # noqa: B027 (most need not)
        """Take from the checkpoint's tensors what its config does not say; by default there is nothing.

        Raises:
            CheckpointError: what they say is not supported.
        """

    @property
    def precision_facts(self) -> PrecisionFacts:
        """What a precision policy must know."""
        text = self.text
        width = gcd(text.hidden_size, text.num_attention_heads * text.head_size)
        return PrecisionFacts(text.num_hidden_layers, scores=self.answers is not None, width=width)

    def vision_model(self, options: GraphOptions) -> nn.Module:
        """The vision encoder: ``pixel_values``, ``image_grid_thw`` → ``image_features``."""
        raise NotImplementedError(f"{type(self).__name__} sets `vision` and does not define `vision_model`")

    @classmethod
    def sees(cls) -> bool:
        """Whether the family has a vision encoder."""
        return cls.vision_model is not Architecture.vision_model

    @property
    def text(self) -> TextFacts:
        """The decoder's sizes."""
        return self.decoder.facts

    @property
    def tied(self) -> bool:
        """The head's weight is the embedding's."""
        return self.decoder.tied

    def untie(self) -> None:
        """The head has a weight of its own from now on, whatever the config says."""
        self.decoder = replace(self.decoder, tied=False)

    def parts(self, options: GraphOptions) -> list[Part]:
        """The graphs of the complete package, the decoder first."""
        if self.vision is None:
            return [self.text_part(options)]
        tokens = [self.vision.image_token_id, self.vision.video_token_id]
        embedding = ImageEmbedding(self.decoder.embed_tokens(), tokens, self.deepstack, options.dtype)
        return [
            self.decoder_part(options),
            vision_part(self.vision_model(options), self.vision.pixels, self.deepstack, options),
            embedding_part(embedding, self.deepstack, options),
        ]

    def decoder_part(self, options: GraphOptions) -> Part:
        """The decoder that takes ``inputs_embeds`` and DeepStack's channel."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("decoder", options, self.deepstack, self.answers)
        module = self.decoder.causal_lm(options, self.deepstack)
        return decoder_part("decoder", module, self.text, options, self.deepstack, self.decoder.position_axes)

    def text_part(self, options: GraphOptions) -> Part:
        """The decoder that takes ``input_ids`` and embeds them itself."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("text", options, None, self.answers)
        module = self.decoder.causal_lm(options, None)
        return decoder_part("text", module, self.text, options, None, self.decoder.position_axes)


def output_width(vision: Section, name: str, text: TextFacts) -> int:
    """The width of the vision encoder's features, which must be the decoder's.

    Raises:
        CheckpointError: it is not.
    """
    width = vision.integer(name, text.hidden_size)
    if width != text.hidden_size:
        raise CheckpointError(
            f"{vision.where}: '{name}' is {width} and the decoder's hidden_size {text.hidden_size}; they must be equal."
        )
    return width


def decoder_part(
    name: str,
    module: nn.Module,
    text: TextFacts,
    options: GraphOptions,
    deepstack: SideChannel | None,
    position_axes: int,
) -> Part:
    """The decoder's ports; it takes ``inputs_embeds`` where ``deepstack`` is given and ``input_ids`` where it is None.

    ``position_axes`` is 3 for M-RoPE's ``[3, B, S]`` positions, 0 for plain ``[B, S]``.
    """
    tokens: tuple[int | str, ...] = ("batch_size", "sequence_length")
    if deepstack is None:
        inputs = [Port("input_ids", INT64, tokens)]
    else:
        inputs = [Port("inputs_embeds", options.dtype, (*tokens, text.hidden_size))]
    inputs += [
        Port("attention_mask", INT64, ("batch_size", "total_sequence_length")),
        Port("position_ids", INT64, (position_axes, *tokens) if position_axes else tokens),
    ]
    if deepstack is not None and deepstack.levels:
        inputs.append(Port(CHANNEL, options.dtype, (*tokens, deepstack.channel_width)))
    outputs = [Port("logits", options.dtype, ("batch_size", 1 if options.last_logits else tokens[1], text.vocab_size))]
    dtype, size = options.cache_of(text)
    for layer in range(text.num_hidden_layers):
        for kind in ("key", "value"):
            cache = ("batch_size", text.num_key_value_heads, "past_sequence_length", size)
            inputs.append(Port(f"past_key_values.{layer}.{kind}", dtype, cache))
            cache = ("batch_size", text.num_key_value_heads, "total_sequence_length", size)
            outputs.append(Port(f"present.{layer}.{kind}", dtype, cache))
    return Part(name, module, tuple(inputs), tuple(outputs))


def vision_part(module: nn.Module, pixels: int, deepstack: SideChannel, options: GraphOptions) -> Part:
    """The vision encoder's ports; ``pixels`` is the length of a flattened patch. Pixels are fp32 in every precision."""
    inputs = (
        Port("pixel_values", ir.DataType.FLOAT, ("num_patches", pixels)),
        Port("image_grid_thw", INT64, ("num_images", 3)),
    )
    features = Port("image_features", options.dtype, ("num_image_tokens", deepstack.feature_width))
    return Part("vision", module, inputs, (features,))


def embedding_part(module: nn.Module, deepstack: SideChannel, options: GraphOptions) -> Part:
    """The embedding's ports; the widths are static, as the runtime needs them for the channel."""
    tokens: tuple[int | str, ...] = ("batch_size", "sequence_length")
    inputs = (
        Port("input_ids", INT64, tokens),
        Port("image_features", options.dtype, ("num_image_tokens", deepstack.feature_width)),
    )
    outputs = [Port("inputs_embeds", options.dtype, (*tokens, deepstack.hidden_size))]
    if deepstack.levels:
        outputs.append(Port(CHANNEL, options.dtype, (*tokens, deepstack.channel_width)))
    return Part("embedding", module, inputs, tuple(outputs))
