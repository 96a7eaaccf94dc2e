"""The interfaces of a package's graphs: their names, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import nn

from vlpack.architectures.hparams import TextFacts
from vlpack.layers.attention import has_grouped_kernel
from vlpack.layers.deepstack import CHANNEL, SideChannel
from vlpack.layers.int8_kv_cache import EXTRA_CHANNELS
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
    """Options of the graphs: the dtype between them, the logits, and the kind of attention and cache.

    Args:
        dtype: dtype of embeddings, image features, cache and logits.
        last_logits: whether only the last token's logits are computed, ``[B, 1, V]``.
        grouped_kernel: whether the execution provider has a fused attention kernel (`has_grouped_kernel`).
        int8_kv_cache: whether keys and values are stored in 8 bits (`vlpack.layers.int8_kv_cache`).
        candidates: whether the head's likeliest tokens are scored again (`vlpack.layers.candidates`).
    """

    dtype: ir.DataType = ir.DataType.FLOAT
    last_logits: bool = True
    grouped_kernel: bool = True
    int8_kv_cache: bool = False
    candidates: bool = False

    @classmethod
    def of_policy(cls, policy: Policy, *, last_logits: bool = True) -> GraphOptions:
        """The graph options that follow from a precision policy."""
        dtype = ir.DataType.FLOAT if policy.dtype == "float32" else ir.DataType.FLOAT16
        return cls(
            dtype,
            last_logits,
            has_grouped_kernel(policy.provider, dtype),
            int8_kv_cache=policy.cache == "int8",
            candidates=policy.scores_candidates,
        )

    def cache_of(self, text: TextFacts) -> tuple[ir.DataType, int]:
        """The dtype of the key/value cache and its number of channels per head."""
        if self.int8_kv_cache:
            return ir.DataType.INT8, text.head_size + EXTRA_CHANNELS
        return self.dtype, text.head_size


def decoder_part(
    name: str,
    module: nn.Module,
    text: TextFacts,
    options: GraphOptions,
    deepstack: SideChannel | None,
    position_axes: int,
) -> Part:
    """The decoder graph of a model that generates, with its inputs and outputs.

    It takes ``inputs_embeds`` if ``deepstack`` is given, and ``input_ids`` if it is None. ``position_axes`` is 3 for
    M-RoPE's positions ``[3, B, S]`` and 0 for plain ones ``[B, S]``.
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
    for layer in range(text.num_hidden_layers):
        for kind, dtype, past, present in _kept(text, options, layer):
            inputs.append(Port(f"past_key_values.{layer}.{kind}", dtype, ("batch_size", *past)))
            outputs.append(Port(f"present.{layer}.{kind}", dtype, ("batch_size", *present)))
    return Part(name, module, tuple(inputs), tuple(outputs))


Shape = tuple[int | str, ...]


def _kept(text: TextFacts, options: GraphOptions, layer: int) -> list[tuple[str, ir.DataType, Shape, Shape]]:
    """The caches or states of a layer: name, dtype, and the shapes before and after a call, without the batch."""
    if layer in text.linear_layers:
        assert text.delta_net is not None, "linear layers have sizes"
        # states are fp32 in every precision: errors in them add up over a sequence
        return [(kind, ir.DataType.FLOAT, shape, shape) for kind, shape in text.delta_net.states.items()]
    dtype, size = options.cache_of(text)
    heads = text.num_key_value_heads
    past, present = (heads, "past_sequence_length", size), (heads, "total_sequence_length", size)
    return [(kind, dtype, past, present) for kind in ("key", "value")]


def vision_part(module: nn.Module, pixels: int, deepstack: SideChannel, options: GraphOptions) -> Part:
    """The vision graph with its inputs and outputs; pixels are fp32 in every precision.

    ``pixels`` is the number of values in a flattened patch.
    """
    inputs = (
        Port("pixel_values", ir.DataType.FLOAT, ("num_patches", pixels)),
        Port("image_grid_thw", INT64, ("num_images", 3)),
    )
    features = Port("image_features", options.dtype, ("num_image_tokens", deepstack.feature_width))
    return Part("vision", module, inputs, (features,))


def embedding_part(module: nn.Module, deepstack: SideChannel, options: GraphOptions) -> Part:
    """The embedding graph with its inputs and outputs; the widths are static because the runtime requires that."""
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
    """The decoder graph of an embedding model or reranker, with its inputs and outputs.

    It has no cache, and its result is fp32 in every precision. It takes ``inputs_embeds`` and ``position_ids`` if
    ``deepstack`` is given, and ``input_ids`` if it is None.
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
