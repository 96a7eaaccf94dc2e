"""Runs a package's graphs in plain onnxruntime, with outputs between the layers and optionally in exact arithmetic.

The graphs are the package's own, with a few nodes changed in memory. *Probes* turn values between the layers into
outputs, at the places where the reference is observed. *Exact* arithmetic multiplies by the dequantized weights in
fp32, where the package rounds activations to 8 bits, so that any remaining difference is an error of the graph. Weights
stay in the package's files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.ort.graph_edits import (
    call,
    compute_all_tokens,
    empty_past,
    load_graph,
    make_exact,
    norm_input,
    open_session,
)
from vlpack.ort.session import ort
from vlpack.preprocess import Prompt
from vlpack.verification.hybrid import collect, inner_values

Array = npt.NDArray[Any]
_PROBE = "probe:"
_INNER = "inner:"


@dataclass(frozen=True)
class Run:
    """A package's intermediate results for a prompt; the fields are those of `vlpack.verification.reference.Trace`.

    For an embedding model or reranker, the last item of ``layers`` has only the last token, because the last layer is
    computed for no other.
    """

    positions: Array
    blocks: list[Array]
    features: Array | None
    levels: list[Array]
    embeds: Array
    layers: list[Array]
    result: Array
    inner: dict[str, Array] = field(default_factory=dict)


class Graphs:
    """The graphs of a package, to be run stage by stage.

    Args:
        folder: the package's folder.
        files: file name of each part's graph, by part.
        prefix: prefix of the names of the decoder's modules.
        hidden_size: width of the decoder.
        num_hidden_layers: number of the decoder's layers.
        depth: number of the vision encoder's blocks; 0 if there is none.
        threads: number of threads of onnxruntime.
        factors: (layer, name of a matrix in it) → the factors ``[C]`` by which the package multiplies what the matrix
            reads; None for none.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str],
        prefix: str,
        hidden_size: int,
        num_hidden_layers: int,
        depth: int,
        threads: int,
        factors: Callable[[int, str], Array | None] = lambda layer, name: None,
    ) -> None:
        self.folder, self.files, self.threads = folder, files, threads
        self.hidden_size, self.factors, self.num_hidden_layers = hidden_size, factors, num_hidden_layers
        self.norms = [f"{prefix}.layers.{layer}.input_layernorm.weight" for layer in range(1, num_hidden_layers)]
        self.norms.append(f"{prefix}.norm.weight")
        self.block_norms = [f"model.visual.blocks.{block}.norm1.weight" for block in range(depth)]

    def load(self, part: str) -> ir.Model:
        """Read a part's graph without its weights, which stay in their files."""
        return load_graph(self.folder / self.files[part])

    def run(self, ids: Array, prompt: Prompt, positions: Array, *, exact: bool) -> Run:
        """Run all graphs and return the intermediate results and the logits of all positions.

        Images go through the vision graph one by one, as in the runtime. A session exists only while it is used.

        Args:
            ids: token ids ``[1, S]``, which begin with the prompt.
            prompt: the prompt, with the pixels of its images.
            positions: position ids ``[3, 1, S]`` or ``[1, S]``.
            exact: whether to multiply in exact arithmetic.
        """
        blocks: list[Array] = []
        features = None
        if prompt.has_images:
            blocks, features = self._vision(prompt, exact)
        if "embedding" in self.files:
            with self._session("embedding", [], exact) as embedding:
                width = embedding.get_inputs()[1].shape[1]
                given = np.zeros((0, width), np.float32) if features is None else features
                tokens = call(embedding, {"input_ids": ids, "image_features": given})
            embeds = tokens["inputs_embeds"]
        else:
            tokens, embeds = {"input_ids": ids}, np.zeros((1, 0, self.hidden_size))
        part = "text" if "text" in self.files else "decoder"
        with self._session(part, self.norms, exact) as decoder:
            inputs = {**tokens, "position_ids": positions, "attention_mask": np.ones(ids.shape, np.int64)}
            names = [port.name for port in decoder.get_inputs()]
            if "position_ids" not in names:  # the text graph of an embedding model counts the positions itself
                del inputs["position_ids"]
            for port in decoder.get_inputs():
                if port.name.startswith("past_key_values"):
                    inputs[port.name] = empty_past(port, 1)
                if port.name == "position_ids" and len(port.shape) > positions.ndim:  # M-RoPE of a text model
                    inputs[port.name] = np.broadcast_to(positions, (3, *positions.shape))
            out = call(decoder, inputs)
        merged, levels = None, []
        if features is not None:
            split = np.split(features, features.shape[1] // self.hidden_size, axis=1)
            merged, levels = split[0], split[1:]
        layers = [out[_PROBE + name][0] for name in self.norms]
        inner: dict[str, list[Array]] = {}
        for name in sorted((name for name in out if name.startswith(_INNER)), key=lambda name: int(name.split(":")[1])):
            inner.setdefault(name.split(":", 2)[2], []).append(out[name])
        return Run(positions, blocks, merged, levels, embeds[0], layers, _result(out), collect(inner, self.factors))

    def _vision(self, prompt: Prompt, exact: bool) -> tuple[list[Array], Array]:
        features, blocks = [], []
        with self._session("vision", self.block_norms, exact) as vision:
            for pixels, grid in prompt.images():
                out = call(vision, {"pixel_values": pixels, "image_grid_thw": grid})
                features.append(out["image_features"])
                blocks.append([out[_PROBE + name].reshape(len(pixels), -1) for name in self.block_norms])
        return [np.concatenate(parts) for parts in zip(*blocks, strict=True)], np.concatenate(features)

    @contextmanager
    def _session(self, part: str, norms: list[str], exact: bool) -> Iterator[ort.InferenceSession]:
        model = self.load(part)
        compute_all_tokens(model.graph)
        _probe(model.graph, {_PROBE + name: norm_input(model.graph, name) for name in norms})
        if part in ("text", "decoder"):
            inner = inner_values(model.graph, self.num_hidden_layers)
            pairs = [(name, value) for name, values in inner.items() for value in values]
            _probe(model.graph, {f"{_INNER}{number}:{name}": value for number, (name, value) in enumerate(pairs)})
        if exact:
            make_exact(model.graph)
        # for 8-bit experts, this variable is the only way to fp32 activations
        variable, before = "ORT_QMOE_CPU_QNBIT_GEMM", os.environ.get("ORT_QMOE_CPU_QNBIT_GEMM")
        if exact:
            os.environ[variable] = "fp32"
        try:
            # an optimization of onnxruntime would turn products with dequantized weights back into quantized ones
            session = open_session(model, self.folder / self.files[part], self.threads, optimized=not exact)
        finally:
            if before is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = before
        yield session


def _result(out: Mapping[str, Array]) -> Array:
    """The final result among a graph's outputs: the logits, the vector, or the probabilities of yes and no."""
    if "scores" in out:
        return np.concatenate([out["scores"], 1 - out["scores"]])
    result: Array = out["sentence_embedding" if "sentence_embedding" in out else "logits"][0]
    return result


def _probe(graph: ir.Graph, values: Mapping[str, ir.Value]) -> None:
    """Make values outputs of the graph, under the given names."""
    for name, value in values.items():
        output = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.append(ir.node("Identity", [value], outputs=[output], name=name))
        graph.outputs.append(output)
