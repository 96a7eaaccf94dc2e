"""Packed decoder graphs, which are edited in memory so that each sequence can have any number of new tokens in a call.

The decoder of a package takes tokens ``[B, S]``, the same number S of each sequence. The packed one takes the N tokens
of all sequences one after the other, ``[1, N]``. Only attention distinguishes sequences: before it, tokens are spread
over ``[B, S]`` rows with padding on the right, and GroupQueryAttention gets the number of tokens in each row as
``query_seqlens`` (from onnxruntime 1.32 on); after it, the tokens are collected again. A sequence without new tokens
costs nothing. The last layer and the head compute only the tokens whose logits are wanted, anywhere in a sequence.
Linear-attention layers are spread and collected in the same way (`vlpack.decoding.states`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlpack.decoding.states import STATE_INPUTS, StatePort, state_ports, with_kept_states
from vlpack.ort.causal_attention import ATTENTION
from vlpack.ort.session import ort

Array = npt.NDArray[Any]

NEWEST_INPUT = 16
"""Index of ``query_seqlens`` among the inputs of GroupQueryAttention."""

WANTED = "wanted"
"""Name of the input with the indices of the tokens whose logits are computed, and name of its dimension."""

PACKING_INPUTS: dict[str, tuple[int, list[str | int | None]]] = {
    "query_seqlens": (TensorProto.INT32, ["rows"]),
    "spread": (TensorProto.INT64, ["rows", "new", 2]),
    "collect": (TensorProto.INT64, [1, "tokens", 2]),
    WANTED: (TensorProto.INT64, [WANTED]),
}
"""Inputs of a packed graph in addition to those of the original graph: name → type and shape."""


class Packing(NamedTuple):
    """Indices that map between the packed tokens ``[1, N]`` and the rows ``[B, S]`` of their sequences.

    Attributes:
        spread: int64 ``[B, S]``, the index among the N tokens of each sequence's s-th token; padding repeats the index
            of the sequence's last token, and rows without tokens have arbitrary valid indices.
        collect: int64 ``[N, 2]``, row and column of each token.
    """

    spread: Array
    collect: Array

    @classmethod
    def of(cls, counts: Array) -> Packing:
        """Computes the indices from the number of new tokens of each sequence, ``[B]``."""
        ends = np.cumsum(counts)
        within = np.minimum(np.arange(int(counts.max()))[None], np.maximum(counts, 1)[:, None] - 1)
        spread = np.minimum((ends - counts)[:, None] + within, ends[-1] - 1)
        rows = np.repeat(np.arange(len(counts)), counts)
        return cls(spread.astype(np.int64), np.stack([rows, np.arange(ends[-1]) - (ends - counts)[rows]], axis=1))

    def inputs(self, counts: Array, wanted: Array) -> dict[str, Array]:
        """The values of `PACKING_INPUTS` for one call.

        Args:
            counts: number of new tokens of each sequence, ``[B]``.
            wanted: indices of the tokens whose logits are computed, ``[K]``.
        """
        return {
            "query_seqlens": counts.astype(np.int32),
            "spread": np.stack([np.zeros_like(self.spread), self.spread], axis=-1),
            "collect": self.collect[None].astype(np.int64),
            WANTED: wanted.astype(np.int64),
        }


class Edits(NamedTuple):
    """The edits of a decoder's graph.

    Attributes:
        packed: whether it takes packed tokens.
        states: states of its linear-attention layers.
    """

    packed: bool
    states: list[StatePort]


def edit_decoder(model: onnx.ModelProto) -> Edits:
    """Edits a decoder's graph in place: packs it if possible, and makes it keep states if it has linear attention.

    A graph cannot be packed if onnxruntime is older than 1.32 or the key/value cache is not in full precision.

    Args:
        model: the decoder, whose weights stay in their files.

    Returns:
        The edits that were made.
    """
    graph, states = model.graph, state_ports(model)
    pack = tuple(map(int, re.findall(r"\d+", ort.__version__)[:2])) >= (1, 32) and _can_be_packed(graph, states)
    if not pack and not states:
        return Edits(False, [])
    nodes = list(graph.node)
    if states:
        nodes = with_kept_states(nodes, pack)
        graph.input.extend(helper.make_tensor_value_info(name, *port) for name, port in STATE_INPUTS.items())
    if pack:
        nodes = _packed(nodes, {tensor.name: tensor for tensor in graph.initializer})
        _rename_dimensions(graph)
        graph.input.extend(helper.make_tensor_value_info(name, *port) for name, port in PACKING_INPUTS.items())
    del graph.node[:], graph.value_info[:]  # the inferred shapes are those of [B, S] tokens
    graph.node.extend(nodes)
    return Edits(pack, states)


def _can_be_packed(graph: onnx.GraphProto, states: Sequence[StatePort]) -> bool:
    """Whether every cached tensor is a state or belongs to an attention node of the main graph.

    The attention of an int8 cache is in the branches of an If node, so it is not in the main graph.
    """
    attention = [node for node in graph.node if node.op_type in ATTENTION]
    caches = [port.name for port in graph.input if port.name.startswith("past")]
    whole = len(caches) == 2 * len(attention) + len(states)
    return bool(attention) and whole and all(len(node.input) <= 7 for node in attention)


def _packed(nodes: Sequence[onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """The nodes of a graph that takes packed tokens, with attention spread over rows."""
    made: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type in ATTENTION:
            made += _spread(node)
        elif _takes_last(node, constants):
            made.append(helper.make_node("Gather", [node.input[0], WANTED], node.output, axis=1))
        else:
            made.append(node)
    return made


def _spread(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of attention over rows ``[B, S]`` whose inputs and output are packed tokens ``[1, N]``."""
    made, out = [], f"{node.output[0]}:rows"
    for place in range(3):
        name = f"{node.input[place]}:rows"
        made.append(helper.make_node("GatherND", [node.input[place], "spread"], [name]))
        node.input[place] = name
    node.input.extend([""] * (NEWEST_INPUT - len(node.input)) + ["query_seqlens"])
    collected = helper.make_node("GatherND", [out, "collect"], [node.output[0]])
    node.output[0] = out
    return [*made, node, collected]


def _takes_last(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a node is the Slice that selects the last token of a sequence: from index -1 on, along axis 1."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return False
    starts, axes = (constants.get(node.input[place]) for place in (1, 3))
    found = [None if value is None else numpy_helper.to_array(value).tolist() for value in (starts, axes)]
    return found == [[-1], [1]]


def _rename_dimensions(graph: onnx.GraphProto) -> None:
    """Gives dimensions that are no longer equal different names: onnxruntime shares memory between equal shapes."""
    for port in [*graph.input, *graph.output]:
        shape = port.type.tensor_type.shape.dim
        if port.name in STATE_INPUTS:
            continue
        if port.name == "attention_mask" or port.name.startswith(("past", "present")):
            shape[0].dim_param = "rows"
        elif port.name == "logits":
            shape[0].dim_value = 1
            if shape[1].dim_value == 1:
                shape[1].dim_param = WANTED
        else:
            for dimension in shape:
                if dimension.dim_param == "batch_size":
                    dimension.dim_value = 1
