"""Hessians ``Σ xᵀx`` of the inputs of a decoder's matrices, measured with only one layer in memory at a time.

Every layer is extracted from the decoder's graph and run on all texts, starting from the hidden states that the layer
before it has computed. Its outputs are the next hidden states and the inputs of its matrices, whose Hessians are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.calibration.experts import ExpertInputs, expert_pairs
from vlpack.calibration.gram import Gram
from vlpack.calibration.teacher import CalibrationModel, Shown
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError, option
from vlpack.export.graph import Weight
from vlpack.ort.graph_edits import (
    compute_all_rows,
    compute_all_tokens,
    empty_past,
    load_graph,
    norm_input,
    open_session,
)
from vlpack.quantize.gptq import HessianFactor, factor_hessian
from vlpack.quantize.transforms import IDENTITY, Channels, ChannelScales, Transform, packed_scales

Array = npt.NDArray[Any]


class _Measured:
    """The Hessian ``Σ xᵀx`` of one input, and the paths of the weights that multiply it."""

    def __init__(self, products: Array, weights: Sequence[Weight]) -> None:
        self.products: Array | None = products
        self.waiting = {weight.path for weight in weights}
        self.factor: HessianFactor | None = None
        self.lock = threading.Lock()


class Calibration:
    """Measures the Hessians of a decoder's matrices, which are requested in the order of its layers.

    Args:
        model: 8-bit package of the same checkpoint.
        weights: matrices whose Hessians will be requested, each once.
        transforms: transforms of the 8-bit package's matrices, by path.
        checkpoint: checkpoint of both packages.
        shown: texts that the decoder is run on.
        about: description of the texts for the manifest.
        progress: function that receives the current layer and the number of layers.

    Attributes:
        scales: scales of the channels of the package that is built, based on measured sizes of activations.
        model: 8-bit package of the same checkpoint.
        checkpoint: checkpoint of both packages.
        shown: texts that the decoder is run on.
    """

    def __init__(
        self,
        model: CalibrationModel,
        weights: Iterable[Weight],
        transforms: Mapping[str, Transform],
        checkpoint: Checkpoint,
        shown: Sequence[Shown],
        about: Mapping[str, Any] = MappingProxyType({}),
        progress: Callable[[int, int], None] = lambda layer, layers: None,
    ) -> None:
        architecture = model.architecture
        self.checkpoint = checkpoint
        self.model, self.shown = model, shown
        self.scales = ChannelScales(checkpoint, self._sizes_of)
        self._transforms, self._scales_before = transforms, ChannelScales(checkpoint)
        self._file, self._threads, self._progress = model.folder / model.decoder_file, model.threads, progress
        self._graph = load_graph(self._file)
        compute_all_tokens(self._graph.graph)
        compute_all_rows(self._graph.graph)
        prefix, count = architecture.decoder.prefix, architecture.text.num_hidden_layers
        self._prefixes = [f"{prefix}.layers.{layer}." for layer in range(count)]
        norms = [*(f"{name}input_layernorm.weight" for name in self._prefixes), f"{prefix}.norm.weight"]
        self._borders = [norm_input(self._graph.graph, norm) for norm in norms]
        self._weights: list[list[Weight]] = [[] for _ in norms]
        self._stage_of: dict[Channels, int] = {}
        weights = list(weights)
        self._checkpoint, self._mixtures = checkpoint, expert_pairs(weights)
        self._experts: dict[str, ExpertInputs] = {}
        for weight in weights:
            stage = self._stage(weight.path)
            if weight.experts == 1:
                self._weights[stage].append(weight)
            if weight.transform.reads is not None:
                self._stage_of[weight.transform.reads] = stage
        self._about = about
        self._shown = [one.inputs for one in shown]
        self._row_factors = row_factors(shown)
        self._hidden = self._first_hidden()
        self._ready: dict[str, _Measured] = {}
        self._sizes: dict[Channels, Array] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __call__(self, weight: Weight, expert: int = 0) -> HessianFactor:
        """Hessian factor of a matrix, or of one of its experts, after the transform of the package that is built."""
        self._look_until(self._stage(weight.path))
        if weight.experts > 1:
            return self._of_expert(weight, expert)
        with self._lock:
            measured = self._ready.pop(weight.path)
        with measured.lock:
            if measured.factor is None:
                products = measured.products
                assert products is not None
                before = self._transforms[weight.path]
                weight.transform.carry(products, self.scales, before, self._scales_before)
                measured.factor, measured.products = factor_hessian(products), None
            return measured.factor

    def again(self, weights: Iterable[Weight]) -> Calibration:
        """A new calibration of other weights with the same model and texts, from which nothing was requested yet."""
        return Calibration(
            self.model, weights, self._transforms, self.checkpoint, self.shown, self._about, self._progress
        )

    def _of_expert(self, weight: Weight, expert: int) -> HessianFactor:
        with self._lock:
            inputs = self._experts[weight.path]
        products = inputs.products(weight, expert)
        weight.transform.carry(products, self.scales, IDENTITY, self._scales_before)
        if expert == weight.experts - 1:
            with self._lock:
                del self._experts[weight.path]
        return factor_hessian(products)

    def described(self) -> dict[str, Any]:
        """Description of the texts and the resulting scales of channels, as JSON for the manifest."""
        return {**self._about, "scales": packed_scales(self.scales.exponents())}

    def _sizes_of(self, channels: Channels) -> Array | None:
        """Root mean squares ``[channels]`` of channels that calibrated matrices read; None for other channels."""
        if channels not in self._stage_of:
            return None
        self._look_until(self._stage_of[channels])
        return self._sizes[channels]

    def _look_until(self, stage: int) -> None:
        with self._lock:
            while self._next <= stage:
                self._look(self._next)
                self._next += 1

    def _stage(self, path: str) -> int:
        """Number of the layer that contains a module; the number of layers for the head."""
        return next((i for i, prefix in enumerate(self._prefixes) if path.startswith(prefix)), len(self._prefixes))

    def _first_hidden(self) -> list[Array]:
        first = self._borders[0]
        if first.is_graph_input():
            return [inputs[str(first.name)] for inputs in self._shown]
        (hidden,) = zip(*self._run(None, [first]), strict=True)
        return list(hidden)

    def _look(self, stage: int) -> None:
        assert stage < len(self._borders), "every matrix is in a layer or after the last"
        self._progress(stage, len(self._borders))
        by_input: dict[int, tuple[ir.Value, list[Weight]]] = {}
        for weight in self._weights[stage]:
            x = factor(self._graph.graph, weight.path)
            by_input.setdefault(id(x), (x, []))[1].append(weight)
        mixtures = [pair for pair in self._mixtures if self._stage(pair[0].path) == stage]
        routed = [value for gate_up, _ in mixtures for value in router(self._graph.graph, gate_up.path)]
        experts = [self._expert_inputs(gate_up) for gate_up, _ in mixtures]
        multiplied = [x for x, _ in by_input.values()]
        following = self._borders[stage + 1 : stage + 2]
        sums = [Gram(weights[0].cols) for _, weights in by_input.values()]
        for text, values in enumerate(self._run(stage, [*multiplied, *routed, *following])):
            given = [rows.reshape(-1, rows.shape[-1]) for rows in values]
            for products, rows in zip(sums, given, strict=False):
                products.add(rows, self._row_factors[text])
            pairs = zip(given[len(sums) :: 2], given[len(sums) + 1 :: 2], strict=False)
            for (gate_up, _), inputs, (rows, logits) in zip(mixtures, experts, pairs, strict=False):
                before = self._transforms[gate_up.path]
                inputs.add(before.undo_inputs(rows, self._scales_before), logits, self._row_factors[text])
            if following:
                self._hidden[text] = values[-1]
        for (input_value, weights), products in zip(by_input.values(), sums, strict=True):
            total = products.total()
            if not np.isfinite(total.diagonal()).all():
                raise CheckpointError(
                    f"The model's activations at {input_value.name} are not finite, so it cannot be calibrated.",
                    f"Build without {option('calibrate')}; to examine the checkpoint, build it with "
                    f"{option('precision', 'fp32')} and run `vlpack verify`.",
                )
            measured = _Measured(total, weights)
            for weight in weights:
                self._ready[weight.path] = measured
                channels = weight.transform.reads
                if channels is not None and channels not in self._sizes:
                    before = self._transforms[weight.path]
                    squares = before.channel_squares(total, self._scales_before).reshape(channels.shape)
                    self._sizes[channels] = np.sqrt(np.maximum(squares.sum(axis=1).reshape(-1), 0) / products.rows)

        for (gate_up, down), inputs in zip(mixtures, experts, strict=True):
            inputs.finish()
            self._experts[gate_up.path] = self._experts[down.path] = inputs
            channels = gate_up.transform.reads
            if channels is not None and channels not in self._sizes:
                self._sizes[channels] = inputs.sizes

    def _expert_inputs(self, gate_up: Weight) -> ExpertInputs:
        (node,) = {use.node for use in self._graph.graph.initializers[f"{gate_up.path}.qweight"].uses()}
        return ExpertInputs(self._checkpoint, gate_up, node.attributes["k"].as_int())

    def _run(self, stage: int | None, outputs: Sequence[ir.Value]) -> Iterable[list[Array]]:
        """Yields ``outputs`` for every text.

        They are computed from the hidden states before layer ``stage``, or for None from the decoder's inputs.
        """
        graph, past = self._graph.graph, f"past_key_values.{stage}."
        inputs = [x for x in graph.inputs if not str(x.name).startswith("past_") or str(x.name).startswith(past)]
        border = None if stage is None else self._borders[stage]
        starts = inputs if border is None or border in inputs else [*inputs, border]
        part = ir.convenience.extract(graph, starts, outputs)
        session = open_session(ir.Model(part, ir_version=self._graph.ir_version), self._file, self._threads)
        ports = {port.name: port for port in session.get_inputs()}
        caches = {name: port for name, port in ports.items() if name.startswith("past_")}
        for text, given in enumerate(self._shown):
            batch = len(given["attention_mask"])
            feeds = {**given, **{name: empty_past(port, batch) for name, port in caches.items()}}
            if border is not None:
                feeds[str(border.name)] = self._hidden[text]
            yield session.run(None, {name: x for name, x in feeds.items() if name in ports})


def row_factors(shown: Sequence[Shown]) -> list[Array | None]:
    """Factors by which each text's rows are multiplied before Hessians are computed, float32 ``[tokens]``; None for 1.

    Image tokens outnumber words and are similar to each other. The factors let all image tokens together count no more
    than the words, so that they do not determine alone how a weight is rounded. (Xue et al. 2025, arXiv:2508.03351,
    weight tokens by their gradients.)
    """
    images = sum(int(one.of_images.sum()) for one in shown if one.of_images is not None)
    words = sum(one.tokens for one in shown) - images
    if images <= words or words == 0:
        return [None] * len(shown)
    small = np.float32((words / images) ** 0.5)  # a product contains it twice
    return [
        None if one.of_images is None else np.where(one.of_images, small, np.float32(1)).astype(np.float32)
        for one in shown
    ]


def router(graph: ir.Graph, path: str) -> tuple[ir.Value, ir.Value]:
    """The input of the experts whose gate and up projections are at ``path``, and the router's logits."""
    (node,) = {use.node for use in graph.initializers[f"{path}.qweight"].uses()}
    x, logits = node.inputs[:2]
    assert x is not None, path
    assert logits is not None, path
    return x, logits


def factor(graph: ir.Graph, path: str) -> ir.Value:
    """The input of the 8-bit matrix of the module at ``path``, before it is quantized."""
    weight = graph.initializers[f"{path}.qweight"]
    (node,) = {use.node for use in weight.uses()}
    x = node.inputs[0]
    if node.op_type == "MatMulIntegerToFloat":
        divided = x.producer().inputs[0]  # type: ignore[union-attr]
        x = divided.producer().inputs[0]  # type: ignore[union-attr]
    assert x is not None, path
    return x
