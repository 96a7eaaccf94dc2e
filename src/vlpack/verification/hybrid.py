"""The stages inside layers with linear attention or output gates, in a package's graph and in the reference.

Only some channels of each stage are kept, evenly spaced, because a layer has many stages and verification holds all
layers of several cases at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

WIDTH = 256
"""Largest number of compared channels per stage."""
CONVOLUTION, GATES, RECURRENCE = "convolution", "gates", "recurrence"
GATED_NORM, GATED_ATTENTION = "gated norm", "gated attention"
READERS = {GATED_NORM: "linear_attn.out_proj", GATED_ATTENTION: "self_attn.o_proj"}
"""The matrices that multiply a stage's values; the package may have balanced these channels."""
KERNELS = {CONVOLUTION: "causal_conv1d_fn", GATES: "torch_chunk_gated_delta_rule"}
"""Functions of transformers that compute a stage, or take its values as arguments."""


def stage_name(layer: int, stage: str) -> str:
    """The name of a stage inside a decoder layer."""
    return f"layer {layer}: {stage}"


def thinned(rows: Array) -> Array:
    """At most `WIDTH` channels of ``rows [S, C]``, evenly spaced."""
    return np.array(rows[:, :: -(-rows.shape[1] // WIDTH)], np.float32)


def inner_values(graph: ir.Graph, layers: int) -> dict[str, list[ir.Value]]:
    """The values of a decoder's graph that form its inner stages, each ``[1, S, C]``, by the stage's name."""
    inputs = {str(value.name): value for value in graph.inputs}
    found: dict[str, list[ir.Value]] = {}
    for layer in range(layers):
        state = inputs.get(f"past_key_values.{layer}.recurrent_state")
        if state is None:
            if (gated := _gated_attention(graph, layer)) is not None:
                found[stage_name(layer, GATED_ATTENTION)] = [gated]
            continue
        (node,) = {use.node for use in state.uses()}
        _, _, v, _, g, beta = node.inputs
        split = v.producer()  # type: ignore[union-attr]
        stages = {CONVOLUTION: [split.inputs[0]], GATES: [g, beta]}  # type: ignore[union-attr]
        stages |= {RECURRENCE: [node.outputs[0]], GATED_NORM: [_gated_norm(graph, layer)]}
        for stage, values in stages.items():
            found[stage_name(layer, stage)] = values  # type: ignore[assignment]
    return found


def _gated_norm(graph: ir.Graph, layer: int) -> ir.Value:
    """The output of a layer's gated norm: its last Sigmoid is that of the SiLU by which the norm is multiplied."""
    *_, last = (
        node for node in graph if node.op_type == "Sigmoid" and f"layers.{layer}/linear_attn/" in str(node.name)
    )
    (silu,) = {use.node for use in last.outputs[0].uses()}
    (product,) = {use.node for use in silu.outputs[0].uses()}
    return product.outputs[0]


def _gated_attention(graph: ir.Graph, layer: int) -> ir.Value | None:
    """The output of a layer's attention after its gates; None if it has none."""
    for node in graph:
        if node.op_type == "Sigmoid" and f"layers.{layer}/self_attn/" in str(node.name):
            (product,) = {use.node for use in node.outputs[0].uses()}
            return product.outputs[0]
    return None


def collect(values: Mapping[str, list[Array]], factors: Callable[[int, str], Array | None]) -> dict[str, Array]:
    """The values of inner stages in the scale of the reference.

    Args:
        values: name of the stage → arrays of `inner_values`.
        factors: function (layer, name of a matrix) → factors ``[C]`` by which the package multiplies the matrix's
            input; None if it is not changed.
    """
    found = {}
    for name, arrays in values.items():
        rows = np.concatenate([array[0] for array in arrays], axis=-1).astype(np.float32)
        head, _, stage = name.partition(": ")
        scales = factors(int(head.removeprefix("layer ")), READERS[stage]) if stage in READERS else None
        found[name] = thinned(rows if scales is None else rows / scales)
    return found


@contextmanager
def watched(layers: Any, found: dict[str, Array]) -> Iterator[None]:
    """While the block runs, records the inner stages of transformers' decoder layers in ``found``."""
    hooks: list[Any] = []
    kernels: list[tuple[str, Any]] = []
    tokens = 0
    linear = [index for index, layer in enumerate(layers) if hasattr(layer, "linear_attn")]

    def keep(layer: int, stage: str, values: Any) -> None:
        # heads are joined: [1, S, heads, D] or [S · heads, D] → [S, C]
        found[stage_name(layer, stage)] = thinned(values.detach().float().numpy().reshape(tokens, -1))

    def count(module: Any, inputs: Any) -> None:
        nonlocal tokens
        tokens = inputs[0].shape[1]

    hooks.append(layers[0].register_forward_pre_hook(count))
    for index, layer in enumerate(layers):
        if index in linear:

            def seen(module: Any, inputs: Any, output: Any, index: int = index) -> None:
                keep(index, RECURRENCE, inputs[0])
                keep(index, GATED_NORM, output)

            hooks.append(layer.linear_attn.norm.register_forward_hook(seen))
        else:
            attention = layer.self_attn
            if (
                attention.q_proj.out_features == 2 * attention.o_proj.in_features
            ):  # the projection has queries and gates

                def read(module: Any, inputs: Any, index: int = index) -> None:
                    keep(index, GATED_ATTENTION, inputs[0])

                hooks.append(attention.o_proj.register_forward_pre_hook(read))
    if linear:
        module = sys.modules[type(layers[linear[0]].linear_attn).__module__]
        calls = {stage: iter(linear) for stage in KERNELS}

        def convolved(*arguments: Any, **options: Any) -> Any:
            output = kernels[0][1](*arguments, **options)
            keep(next(calls[CONVOLUTION]), CONVOLUTION, output[0].T[-tokens:])
            return output

        def gates(*arguments: Any, **options: Any) -> Any:
            import torch

            keep(next(calls[GATES]), GATES, torch.cat([options["g"][0], options["beta"][0]], dim=-1))
            return kernels[1][1](*arguments, **options)

        kernels = [(name, getattr(module, name)) for name in KERNELS.values()]
        for name, wrapper in zip(KERNELS.values(), (convolved, gates), strict=True):
            setattr(module, name, wrapper)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, kernel in kernels:
            setattr(module, name, kernel)
