"""The harm of 4 bits in each half of a decoder's layers, measured with that half in 4 bits and the rest in 8.

The halves of a layer are attention and feed-forward. Each half reaches from the norm before it to the norm before the
next one, so that its input and output are the residual stream, which has the same form in 4-bit and 8-bit packages.
Activations are not rounded: their noise changes with every change of an input, and would hide the harm of half a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.calibration.teacher import CalibrationModel, Shown
from vlpack.ort.graph_edits import compute_all_tokens, empty_past, load_graph, make_exact, norm_input, open_session

Array = npt.NDArray[Any]

TEXTS, TOKENS = 6, 32
"""Number of the calibration's texts whose beginnings are used, and tokens of each: enough to rank the halves of
layers, though not to know their harm precisely."""


TOGETHER = 8
"""Variants of the residual stream that are run at a time."""
TOKENS_IN = ("input_ids", "inputs_embeds")
"""Names of the decoder inputs that become the residual stream before the first layer."""


class Half(NamedTuple):
    """One half of a layer: attention (``self_attn``, also if it is linear) or feed-forward (``mlp``)."""

    layer: int
    module: str


HALVES = ("self_attn", "mlp")


def harms(
    eight: CalibrationModel,
    four: CalibrationModel,
    shown: Sequence[Shown],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Half, float]:
    """The harm of each half of a layer: the KL divergence, in nats per token, that storing it in 4 bits causes.

    It compares the model's predictions with that half in 4 bits and the rest in 8 to those with 8 bits everywhere.

    Args:
        eight: package with 8 bits.
        four: package of the same checkpoint with 4 bits, rounded as in the final package; only its decoder is used.
        shown: texts; the beginnings of the first `TEXTS` texts with at least `TOKENS` tokens are used.
        progress: function that receives the number of halves that have been run, and of all halves.
    """
    given = _beginnings([one.inputs for one in shown if one.tokens >= TOKENS][:TEXTS])
    exact, coarse = _Stages(eight), _Stages(four)
    # variants of the residual stream: with 8 bits everywhere, and one for each half so far with 4 bits in that half
    streams = [exact.first(given)]
    for stage in range(exact.count):
        progress(stage, exact.count)
        rounded = coarse.run(stage, given, streams[:1])
        streams = exact.run(stage, given, streams) + rounded
    logs = exact.log_shares(streams[0])
    found = {}
    for stage, stream in enumerate(streams[1:]):
        other = exact.log_shares(stream)
        found[Half(stage // 2, HALVES[stage % 2])] = float((np.exp(logs) * (logs - other)).sum(axis=-1).mean())
    return found


def _beginnings(inputs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The first `TOKENS` tokens of texts as one batch; each text is a batch of one."""
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
    """A package's decoder, divided into halves of layers that are loaded only while they run."""

    def __init__(self, model: CalibrationModel) -> None:
        self._file, self._threads = model.folder / model.decoder_file, model.threads
        self._graph = load_graph(self._file)
        compute_all_tokens(self._graph.graph)
        make_exact(self._graph.graph)
        prefix, layers = model.architecture.decoder.prefix, model.architecture.text.num_hidden_layers
        self.count = 2 * layers
        names = [
            f"{prefix}.layers.{layer}.{norm}.weight"
            for layer in range(layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        self._borders = [norm_input(self._graph.graph, norm) for norm in [*names, f"{prefix}.norm.weight"]]
        self._head: Any = None

    def first(self, given: Mapping[str, Array]) -> Array:
        """The residual stream before the first layer."""
        border = self._borders[0]
        if border.is_graph_input():
            return given[str(border.name)]
        return self._feed(self._session(None, border), given, {})

    def run(self, stage: int, given: Mapping[str, Array], streams: Sequence[Array]) -> list[Array]:
        """The residual streams after the half with the number ``stage``, computed from those before it."""
        session = self._session(self._borders[stage], self._borders[stage + 1], stage // 2)
        name = str(self._borders[stage].name)
        found: list[Array] = []
        for start in range(0, len(streams), TOGETHER):  # weights are dequantized for each call
            some = streams[start : start + TOGETHER]
            repeated = {key: _repeated(key, value, len(some)) for key, value in given.items()}
            found += np.split(self._feed(session, repeated, {name: np.concatenate(some)}), len(some))
        return found

    def log_shares(self, stream: Array) -> Array:
        """Log-probabilities of the next token, ``[texts, tokens, vocabulary]``, for the second half of the tokens."""
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
                fed[port.name] = empty_past(port, batch)
            else:
                fed[port.name] = feeds[port.name]
        result: Array = session.run(None, fed)[0]
        return result
