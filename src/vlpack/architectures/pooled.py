"""The inputs and outputs of embedding models' and rerankers' decoders."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from vlpack.architectures.base import INT64, GraphOptions, Part, Port, TextFacts
from vlpack.layers.deepstack import CHANNEL, SideChannel


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
