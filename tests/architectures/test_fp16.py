"""fp16 graphs on a GPU round every value between nodes; none may exceed fp16's range if the fp32 model is fine.

onnxruntime's CPU kernels compute fp16 products in fp32 and drop the casts between them. So a value that would be
infinite on a GPU is finite on the CPU, unless it is a graph's output. Therefore these tests make all values outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from architectures.test_parity_parts import HALF, dequantized
from parity import Package, Reference, make_inputs, relative
from samples import Tensor, edit_tensors
from tiny import Tiny, make_checkpoint
from vlpack.builder import build
from vlpack.options import parse_extra_options

torch = pytest.importorskip("torch")

LARGEST = 65504
TINY = Tiny(seed=3)
GAINS = {
    "language_model.layers.1.mlp.gate_proj": 600.0,
    "language_model.layers.1.mlp.up_proj": 600.0,
    "language_model.layers.1.mlp.down_proj": 3.0,
    "visual.blocks.1.mlp.linear_fc1": 9000.0,
    "visual.blocks.1.mlp.linear_fc2": 200.0,
}
"""Factors on weights, chosen so that each layer's output fits fp16 but values computed from several outputs do not."""


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with massive activations in the middle layer of decoder and vision encoder."""
    folder = make_checkpoint(tmp_path_factory.mktemp("loud") / "checkpoint", TINY)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, gain in GAINS.items():
            tensor = tensors[f"model.{name}.weight"]
            values = np.frombuffer(tensor.data, np.float32) * np.float32(gain)
            tensors[f"model.{name}.weight"] = tensor._replace(data=values.tobytes())

    edit_tensors(folder, edit)
    return folder


@contextmanager
def magnitudes(model: Any, names: list[str]) -> Iterator[dict[str, tuple[float, float]]]:
    """The largest magnitudes of each linear layer's input and output, collected while the model runs."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[name] = (float(inputs[0].abs().max()), float(output.abs().max()))

        return hook

    hooks = [model.get_submodule(f"model.{name}").register_forward_hook(note(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run_exposed(path: Path, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Runs a graph; returns its outputs and all fp16 values between its nodes, by the nodes' names."""
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    outputs = [port.name for port in model.graph.output]
    halves = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    names = {node.output[0]: node.name for node in model.graph.node if node.output[0] in halves - set(outputs)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    exposed = path.with_name(f"exposed-{path.name}")
    onnx.save(model, exposed)
    session = ort.InferenceSession(exposed, providers=["CPUExecutionProvider"])
    types = {port.name: port.type for port in session.get_inputs()}
    given = {k: v.astype(np.float16) if types[k] == "tensor(float16)" else v for k, v in inputs.items()}
    values = dict(zip([*outputs, *names], session.run([*outputs, *names], given), strict=True))
    return {name: values[name] for name in outputs}, {node: values[name] for name, node in names.items()}


def check_range(values: dict[str, np.ndarray], last: str) -> None:
    """Checks that all values are finite, and that the outputs of the feed-forward layers are among them."""
    assert [name for name, value in values.items() if not np.isfinite(value).all()] == []
    products = [name for name in values if f"{last}/MatMul" in name]
    assert len(products) >= min(TINY.depth, TINY.layers)


@pytest.mark.parametrize(("provider", "precision"), [("cpu", "fp16"), ("cuda", "fp16"), ("webgpu", "int4")])
def test_no_value_leaves_the_range(provider: str, precision: str, loud: Path, tmp_path: Path) -> None:
    folder, reference = tmp_path / "package", Reference(loud)
    options = parse_extra_options(["prune_lm_head=false"])
    build(loud, folder, precision=precision, execution_provider=provider, extra_options=options)
    inputs = make_inputs(TINY, ((1, 4, 6),))
    with (
        reference.with_weights(dequantized(precision, provider)),
        magnitudes(reference.model, list(GAINS)) as found,
    ):
        expected = reference(inputs)
    # in the reference, the first matrices' outputs fit fp16, and the last ones' exceed its range
    for first, last in (("gate_proj", "down_proj"), ("up_proj", "down_proj"), ("linear_fc1", "linear_fc2")):
        outs = {name.rpartition(".")[2]: sizes for name, sizes in found.items()}
        assert outs[first][1] < LARGEST < outs[last][1]
    assert outs["down_proj"][0] > LARGEST

    given = {"pixel_values": inputs.pixels, "image_grid_thw": inputs.grid}
    out, values = run_exposed(folder / "vision.onnx", given)
    check_range(values, "linear_fc2")
    features = out["image_features"]
    levels = np.concatenate([expected.merged, *expected.levels], axis=-1)
    assert relative(features, levels) <= HALF

    out = Package(folder).embed(inputs.ids, features)
    cache = np.zeros((1, TINY.kv_heads, 0, TINY.head_dim), np.float16)
    given = {f"past_key_values.{i}.{kind}": cache for i in range(TINY.layers) for kind in ("key", "value")}
    given |= {"attention_mask": np.ones_like(inputs.ids), "position_ids": expected.positions, **out}
    out, values = run_exposed(folder / "decoder.onnx", given)
    nodes = onnx.load(folder / "decoder.onnx", load_external_data=False).graph.node
    assert "Max" not in {
        node.op_type for node in nodes
    }  # WebGPU has no kernel for Max, so every layer would wait for the CPU
    check_range(values, "down_proj")
    assert relative(out["logits"], expected.logits) <= HALF
