"""The graphs of a package as seen from outside: their names, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import nn

from vlpack.architectures.hparams import TextFacts
from vlpack.layers.attention import has_grouped_kernel
from vlpack.layers.deepstack import CHANNEL, SideChannel
from vlpack.layers.int8_kv_codes import EXTRA
from vlpack.quantize.policy import Policy

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
        """``vision`` or ``text``: the first word of its weights' roles (`vlpack.quantize.policy`)."""
        return "vision" if self.name == "vision" else "text"


@dataclass(frozen=True)
class GraphOptions:
    """What passes between the graphs, and how tokens attend.

    Args:
        dtype: of embeddings, image features, cache and logits.
        last_logits: only the last token's logits, ``[B, 1, V]``.
        grouped_kernel: onnxruntime has its fused attention where the graphs will run (`has_grouped_kernel`).
        byte_cache: keys and values are kept in 8 bits (`vlpack.layers.int8_kv_cache`).
    """

    dtype: ir.DataType = ir.DataType.FLOAT
    last_logits: bool = True
    grouped_kernel: bool = True
    byte_cache: bool = False

    @classmethod
    def of_policy(cls, policy: Policy, *, last_logits: bool = True) -> GraphOptions:
        """What follows from a precision policy."""
        dtype = ir.DataType.FLOAT if policy.dtype == "float32" else ir.DataType.FLOAT16
        return cls(dtype, last_logits, has_grouped_kernel(policy.provider, dtype), policy.cache == "int8")

    def cache_of(self, text: TextFacts) -> tuple[ir.DataType, int]:
        """The cache's dtype and channels per head."""
        if self.byte_cache:
            return ir.DataType.INT8, text.head_size + EXTRA
        return self.dtype, text.head_size


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


def pooled_part(
    name: str,
    module: nn.Module,
    text: TextFacts,
    options: GraphOptions,
    deepstack: SideChannel | None,
    scores: bool,
) -> Part:
    """The ports of an embedding model's or reranker's decoder, which has no cache; results are fp32 in all precisions.

    It takes ``inputs_embeds`` with their positions where ``deepstack`` is given, and ``input_ids`` where it is None.
    """
    tokens: tuple[int | str, ...] = ("batch_size", "sequence_length")
    mask = Port("attention_mask", INT64, tokens)
    if deepstack is None:
        inputs = [Port("input_ids", INT64, tokens), mask]
    else:
        inputs = [Port("inputs_embeds", options.dtype, (*tokens, text.hidden_size)), mask]
        inputs.append(Port("position_ids", INT64, (3, *tokens)))
        if deepstack.levels:
            inputs.append(Port(CHANNEL, options.dtype, (*tokens, deepstack.channel_width)))
    output = Port("sentence_embedding", ir.DataType.FLOAT, ("batch_size", text.hidden_size))
    if scores:
        output = Port("scores", ir.DataType.FLOAT, ("batch_size",))
    return Part(name, module, tuple(inputs), (output,))
