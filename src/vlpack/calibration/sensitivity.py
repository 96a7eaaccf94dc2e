"""Where a decoder suffers most from 4 bits, measured: one half of a layer after the other in 4 bits, the rest in 8.

A layer's halves are attention and feed-forward. The first runs from the norm before it to the norm before the other,
so that what goes in and out is the residual stream, which is the same in packages of 4 and of 8 bits. Activations are
not rounded: their noise, which is another with every change of an input, would hide the harm of half a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.calibration.model import CalibrationModel, Shown
from vlpack.graph_edits import every_token, load_graph, make_exact, normalized, open_session

Array = npt.NDArray[Any]

TEXTS, TOKENS = 6, 32
"""So many beginnings of the calibration's texts are looked at: enough to rank layers, not to know their harm well."""


TOGETHER = 8
"""Variants of the residual stream that are run at a time."""
TOKENS_IN = ("input_ids", "inputs_embeds")
"""What a decoder is given of each token, which becomes the residual stream before the first layer."""


class Half(NamedTuple):
    """Attention (``self_attn``) or feed-forward (``mlp``) of a layer."""

    layer: int
    module: str


HALVES = ("self_attn", "mlp")


def harms(
    eight: CalibrationModel,
    four: CalibrationModel,
    shown: Sequence[Shown],
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Half, float]:
    """KL divergence, nats per token, of the model with that half in 4 bits from the one in 8, for each half.

    Args:
        eight: a package with 8 bits.
        four: the decoder of one of the same checkpoint with 4, rounded as it is going to be.
        shown: to the decoder; the beginnings of the first `TEXTS` texts that are long enough are taken.
        say: told how many halves of how many have been run.
    """
    given = _beginnings([one.inputs for one in shown if one.tokens >= TOKENS][:TEXTS])
    exact, coarse = _Stages(eight), _Stages(four)
    # variants of the residual stream: of 8 bits everywhere, and for each half so far with 4 bits there
    streams = [exact.first(given)]
    for stage in range(exact.count):
        say(stage, exact.count)
        rounded = coarse.run(stage, given, streams[:1])
        streams = exact.run(stage, given, streams) + rounded
    logs = exact.log_shares(streams[0])
    found = {}
    for stage, stream in enumerate(streams[1:]):
        other = exact.log_shares(stream)
        found[Half(stage // 2, HALVES[stage % 2])] = float((np.exp(logs) * (logs - other)).sum(axis=-1).mean())
    return found


def _beginnings(inputs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The first `TOKENS` of texts, each a batch of one, as a batch."""
    batch = {}
    for name in inputs[0]:
        axis = _batch_axis(name, inputs[0][name])
        batch[name] = np.concatenate([one[name].take(range(TOKENS), axis + 1) for one in inputs], axis)
    return batch


def _repeated(name: str, value: Array, times: int) -> Array:
    """A batch so many times over."""
    return np.concatenate([value] * times, _batch_axis(name, value))


def _batch_axis(name: str, value: Array) -> int:
    """Positions of a model that sees are ``[3, batch, tokens]``."""
    return 1 if name == "position_ids" and value.ndim == 3 else 0


class _Stages:
    """A package's decoder in halves of layers, each of which is loaded when it is run."""

    def __init__(self, model: CalibrationModel) -> None:
        self._file, self._threads = model.folder / model.decoder_file, model.threads
        self._graph = load_graph(self._file)
        every_token(self._graph.graph)
        make_exact(self._graph.graph)
        prefix, layers = model.architecture.decoder.prefix, model.architecture.text.num_hidden_layers
        self.count = 2 * layers
        names = [
            f"{prefix}.layers.{layer}.{norm}.weight"
            for layer in range(layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        self._borders = [normalized(self._graph.graph, norm) for norm in [*names, f"{prefix}.norm.weight"]]
        self._head: Any = None

    def first(self, given: Mapping[str, Array]) -> Array:
        """The residual stream before the first layer."""
        border = self._borders[0]
        if border.is_graph_input():
            return given[str(border.name)]
        return self._feed(self._session(None, border), given, {})

    def run(self, stage: int, given: Mapping[str, Array], streams: Sequence[Array]) -> list[Array]:
        """The residual streams after a half, from those before it."""
        session = self._session(self._borders[stage], self._borders[stage + 1], stage // 2)
        name = str(self._borders[stage].name)
        found: list[Array] = []
        for start in range(0, len(streams), TOGETHER):  # weights are dequantized for each call
            some = streams[start : start + TOGETHER]
            repeated = {key: _repeated(key, value, len(some)) for key, value in given.items()}
            found += np.split(self._feed(session, repeated, {name: np.concatenate(some)}), len(some))
        return found

    def log_shares(self, stream: Array) -> Array:
        """Logarithms of the next token's shares ``[texts, tokens, vocabulary]``, of the last half of the tokens."""
        border = self._borders[-1]
        if self._head is None:
            logits = next(value for value in self._graph.graph.outputs if value.name == "logits")
            self._head = self._open([border], logits)
        rows = self._feed(self._head, {}, {str(border.name): stream[:, stream.shape[1] // 2 :]})
        rows = rows - rows.max(axis=-1, keepdims=True)
        return np.asarray(rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)))

    def _session(self, start: ir.Value | None, end: ir.Value, layer: int | None = None) -> Any:
        graph, past = self._graph.graph, f"past_key_values.{layer}."
        inputs = [x for x in graph.inputs if not str(x.name).startswith("past_") or str(x.name).startswith(past)]
        if start is not None:
            inputs = [start, *(x for x in inputs if x is not start and x.name not in TOKENS_IN)]
        return self._open(inputs, end)

    def _open(self, starts: Sequence[ir.Value], end: ir.Value) -> Any:
        part = ir.convenience.extract(self._graph.graph, starts, [end])
        # of dequantized weights onnxruntime would make quantized products again
        model = ir.Model(part, ir_version=self._graph.ir_version)
        return open_session(model, self._file, self._threads, optimized=False)

    def _feed(self, session: Any, given: Mapping[str, Array], stream: Mapping[str, Array]) -> Array:
        feeds = {**given, **stream}
        batch = next(iter(feeds.values())).shape[0] if stream else len(given["attention_mask"])
        fed = {}
        for port in session.get_inputs():
            if port.name.startswith("past_"):
                kind = np.int8 if port.type == "tensor(int8)" else np.float32
                fed[port.name] = np.zeros((batch, port.shape[1], 0, port.shape[3]), kind)
            else:
                fed[port.name] = feeds[port.name]
        result: Array = session.run(None, fed)[0]
        return result
