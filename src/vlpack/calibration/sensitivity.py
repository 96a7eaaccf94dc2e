"""The sensitivity of each half of a decoder's layers to 4 bits, measured with that half in 4 bits and the rest in 8.

The halves of a layer are attention and feed-forward. Each half extends from the norm before it to the norm before the
next one, so that its input and output are the residual stream, which has the same form in 4-bit and 8-bit packages.
Activations are not quantized here: their rounding errors would hide the effect of half a layer.
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
"""Number of calibration texts that are used, and number of tokens from the beginning of each. They are enough to rank
the halves of layers, but not to know their harm precisely."""


TOGETHER = 8
"""Number of variants of the residual stream that are run at the same time."""
TOKENS_IN = ("input_ids", "inputs_embeds")
"""Names of the decoder inputs from which the residual stream before the first layer is computed."""


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
    """The harm that storing each half of a layer in 4 bits does: a KL divergence in nats per token.

    The divergence is that of the model's predictions with this half in 4 bits and the rest in 8 bits from its
    predictions with 8 bits everywhere.

    Args:
        eight: 8-bit package.
        four: 4-bit package of the same checkpoint, rounded as in the final package; only its decoder is used.
        shown: texts; the beginnings of the first `TEXTS` texts with at least `TOKENS` tokens are used.
        progress: function that receives the number of finished halves and the number of all halves.
    """
    given = _beginnings([one.inputs for one in shown if one.tokens >= TOKENS][:TEXTS])
    exact, coarse = _Stages(eight), _Stages(four)
    # variants of the residual stream: first with 8 bits everywhere, then one for each half so far, with that in 4 bits
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
    """The first `TOKENS` tokens of all texts as one batch, made from inputs that are batches of one text each."""
    batch = {}
    for name in inputs[0]:
        axis = _batch_axis(name, inputs[0][name])
        batch[name] = np.concatenate([one[name].take(range(TOKENS), axis + 1) for one in inputs], axis)
    return batch


def _repeated(name: str, value: Array, times: int) -> Array:
    """The batch ``value``, repeated ``times`` times."""
    return np.concatenate([value] * times, _batch_axis(name, value))


def _batch_axis(name: str, value: Array) -> int:
    """The batch axis of a decoder input: 1 for M-RoPE positions ``[3, batch, tokens]``, 0 for all others."""
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
        """The residual streams after half number ``stage``, computed from the streams before it."""
        session = self._session(self._borders[stage], self._borders[stage + 1], stage // 2)
        name = str(self._borders[stage].name)
        found: list[Array] = []
        for start in range(0, len(streams), TOGETHER):  # weights are dequantized for each call
            some = streams[start : start + TOGETHER]
            repeated = {key: _repeated(key, value, len(some)) for key, value in given.items()}
            found += np.split(self._feed(session, repeated, {name: np.concatenate(some)}), len(some))
        return found

    def log_shares(self, stream: Array) -> Array:
        """Log-probabilities of the next token, ``[texts, tokens, vocabulary]``, at the second half of the positions."""
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
        # with optimization, onnxruntime would fuse the dequantization of weights into quantized products again
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
