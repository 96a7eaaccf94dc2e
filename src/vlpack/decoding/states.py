"""The states of linear-attention layers: how a decoder's graph keeps them, and the buffers that hold them.

A state has a constant size and cannot be rewound to an earlier token. So a call must not change the states of sequences
without new tokens, and padding must not change those of shorter sequences; `with_kept_states` edits a graph in memory
to ensure this. An earlier state is available only if it was copied at that time, into a `Snapshot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from vlpack.ort.session import ort

Array = npt.NDArray[Any]

STATE_INPUTS: dict[str, tuple[int, list[str | int | None]]] = {
    "newest": (TensorProto.INT64, [None, None, 2]),
    "older": (TensorProto.INT64, [None, None, 2]),
    "renewed": (TensorProto.BOOL, [None, None, 1]),
    "present_tokens": (TensorProto.FLOAT, [None, None, 1]),
}
"""Inputs of an edited graph in addition to those of the original graph: name → type and shape. `state_inputs` computes
their values."""

UNKNOWN = -1
"""The length of a sequence whose state is unknown, because a call that changed it has not succeeded."""


class StatePort(NamedTuple):
    """An input of the decoder for a layer's state, with the output for the same state after the call.

    Attributes:
        past: name of the input.
        present: name of the output.
        shape: shape of one sequence's state.
        in_place: whether input and output may share the same memory.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    in_place: bool

    @property
    def row_bytes(self) -> int:
        """The size of one sequence's state in bytes; its values are fp32."""
        return 4 * int(np.prod(self.shape))


def state_ports(model: onnx.ModelProto) -> list[StatePort]:
    """The states of a decoder's graph, in the order of its nodes; empty if the decoder has no linear attention."""
    shapes = {
        port.name: tuple(int(size.dim_value) for size in port.type.tensor_type.shape.dim[1:])
        for port in model.graph.input
    }
    return [
        # LinearAttention reads a state before it writes it; the new state of a convolution is gathered from the old one
        StatePort(node.input[3], node.output[1], shapes[node.input[3]], node.op_type == "LinearAttention")
        for node in model.graph.node
        if node.op_type in ("CausalConvWithState", "LinearAttention")
        and len(node.input) > 3
        and node.input[3] in shapes
    ]


def with_kept_states(nodes: Sequence[onnx.NodeProto], packed: bool) -> list[onnx.NodeProto]:
    """Edits the nodes of a graph so that only a sequence's own new tokens change its states.

    A padding token has a decay of 1 and an update rate of 0, which leaves the recurrent state as it is. The
    convolution's state after a call is gathered from a sequence's newest tokens and, if they are too few, from its
    state before the call.

    Args:
        nodes: nodes in their order.
        packed: whether tokens are packed ``[1, N]`` and must be spread over rows ``[B, S]`` for these layers
            (`vlpack.decoding.packing`).

    Returns:
        The nodes of the edited graph, in their order.
    """
    made: list[onnx.NodeProto] = []
    makers = {output: node for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type == "CausalConvWithState":
            transpose = makers[node.input[0]]  # [B, S, C] → [B, C, S]
            made += _convolved(node, transpose, packed)
        elif node.op_type == "LinearAttention":
            made += _recurred(node, packed)
        else:
            made.append(node)
    return made


def _convolved(node: onnx.NodeProto, transpose: onnx.NodeProto, packed: bool) -> list[onnx.NodeProto]:
    """The nodes of a convolution whose state after a call is gathered from each sequence's own tokens."""
    tokens, state, present = transpose.input[0], node.input[3], node.output[1]
    made = []
    if packed:
        rows = f"{tokens}:rows"
        made.append(helper.make_node("GatherND", [tokens, "spread"], [rows]))
        made.append(helper.make_node("Transpose", [rows], [f"{rows}:channels"], perm=[0, 2, 1]))
        node.input[0] = f"{rows}:channels"
    node.output[1] = f"{present}:of padding"
    made.append(node)
    before, new, old, kept = (f"{present}:{part}" for part in ("before", "new", "old", "kept"))
    made.append(helper.make_node("Transpose", [state], [before], perm=[0, 2, 1]))  # [B, K - 1, C]
    made.append(helper.make_node("GatherND", [tokens, "newest"], [new]))
    made.append(helper.make_node("GatherND", [before, "older"], [old]))
    made.append(helper.make_node("Where", ["renewed", new, old], [kept]))
    made.append(helper.make_node("Transpose", [kept], [present], perm=[0, 2, 1]))
    return made


def _recurred(node: onnx.NodeProto, packed: bool) -> list[onnx.NodeProto]:
    """The nodes of a recurrence that leaves its state unchanged by padding tokens."""
    made = []
    for place in (4, 5):  # logarithm of the decay, and update rate: [B, S, heads]
        gate = node.input[place]
        rows = f"{gate}:rows"
        if packed:
            made.append(helper.make_node("GatherND", [gate, "spread"], [rows]))
        node.input[place] = f"{gate}:masked"
        made.append(helper.make_node("Mul", [rows if packed else gate, "present_tokens"], [node.input[place]]))
    made.append(node)
    if packed:
        out = f"{node.output[0]}:rows"
        made.append(helper.make_node("GatherND", [out, "collect"], [node.output[0]]))
        node.output[0] = out
    return made


def state_inputs(counts: Array, window: int, packed: bool) -> dict[str, Array]:
    """The values of `STATE_INPUTS` for one call.

    Args:
        counts: number of new tokens of each sequence, ``[B]``.
        window: number K - 1 of tokens in a convolution's state.
        packed: whether the tokens of all sequences lie one after the other, ``[1, N]``, instead of in rows ``[B, S]``.
    """
    rows = len(counts)
    place = counts[:, None] - window + np.arange(window)  # [B, K - 1]: index among the new tokens, or negative
    first = np.cumsum(counts) - counts if packed else np.zeros(rows, np.int64)
    row = np.zeros((rows, window)) if packed else np.broadcast_to(np.arange(rows)[:, None], (rows, window))
    last = int(counts.sum() if packed else counts.max()) - 1
    newest = np.clip(first[:, None] + np.maximum(place, 0), 0, last)
    older = np.minimum(place + window, window - 1)  # the state before the call holds the tokens from -window to -1
    here = np.broadcast_to(np.arange(rows)[:, None], (rows, window))
    return {
        "newest": np.stack([row, newest], axis=-1).astype(np.int64),
        "older": np.stack([here, older], axis=-1).astype(np.int64),
        "renewed": (place >= 0)[..., None],
        "present_tokens": (np.arange(int(counts.max())) < counts[:, None])[..., None].astype(np.float32),
    }


class Snapshot(NamedTuple):
    """A copy of a sequence's states.

    Attributes:
        length: number of tokens after which the states were copied.
        values: array of each state, which is never changed.
    """

    length: int
    values: Sequence[Array]


class States:
    """The buffers for the states of sequences, whose rows correspond to the rows of the key/value cache.

    Args:
        ports: states of the decoder; if there are none, methods do nothing, and `knows` is true for every length.
        rows: number of sequences.
    """

    def __init__(self, ports: Sequence[StatePort], rows: int) -> None:
        self._ports = ports
        self._rows = [np.zeros((rows, *port.shape), np.float32) for port in ports]
        self._after = [
            rows_before if port.in_place else np.zeros_like(rows_before)
            for port, rows_before in zip(ports, self._rows, strict=True)
        ]
        self._seen = [0] * rows

    def __bool__(self) -> bool:
        return bool(self._ports)

    def bind(self, binding: Any, first: int, end: int) -> None:
        """Binds the states of a range of rows as inputs and outputs of the decoder."""
        for port, before, after in zip(self._ports, self._rows, self._after, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(before[first:end])
            binding.bind_ortvalue_input(port.past, value)
            out = value if port.in_place else ort.OrtValue.ortvalue_from_numpy(after[first:end])
            binding.bind_ortvalue_output(port.present, out)

    def knows(self, row: int, length: int) -> bool:
        """Whether the states of a row are those after this number of tokens."""
        return not self._ports or self._seen[row] == length

    def begin(self, first: int, counts: Array) -> None:
        """Marks the states that a call changes as unknown, until `end` is called.

        Args:
            first: first row of the call.
            counts: number of new tokens of each row.
        """
        for row in first + np.flatnonzero(counts):
            self._seen[row] = UNKNOWN

    def end(self, first: int, counts: Array, held: Array) -> None:
        """Makes the states after a call the current ones.

        Args:
            first: first row of the call.
            counts: number of new tokens of each row.
            held: number of tokens of each row before the call.
        """
        for row in np.flatnonzero(counts):
            for before, after in zip(self._rows, self._after, strict=True):
                if before is not after:
                    before[first + row] = after[first + row]
            self._seen[first + row] = int(held[row] + counts[row])

    def snapshot(self, row: int) -> Snapshot:
        """A copy of a row's states."""
        return Snapshot(self._seen[row], [rows[row].copy() for rows in self._rows])

    def restore(self, row: int, snapshot: Snapshot | None) -> None:
        """Sets a row's states to those of a snapshot, or to zeros, the states before the first token, if it is None."""
        self._seen[row] = UNKNOWN
        for place, rows in enumerate(self._rows):
            rows[row] = 0 if snapshot is None else snapshot.values[place]
        self._seen[row] = 0 if snapshot is None else snapshot.length

    def copy(self, source: int, target: int) -> None:
        """Copies the states of one row to another."""
        self._seen[target] = UNKNOWN
        for rows in self._rows:
            rows[target] = rows[source]
        self._seen[target] = self._seen[source]

    def exchange(self, one: int, two: int) -> None:
        """Exchanges the states of two rows."""
        for rows in self._rows:
            rows[[one, two]] = rows[[two, one]]
        self._seen[one], self._seen[two] = self._seen[two], self._seen[one]
