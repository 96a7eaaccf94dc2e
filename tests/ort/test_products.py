"""Which nodes around products by 8-bit matrices the operators replace; kernels/tests tests the operators themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlpack.ort.kernels import DOMAIN, Library, use_kernels
from vlpack.quantize.rotate import rotation_matrix

FAST = Library("kernels.so", "avx512")
CONSTANTS: dict[str, Any] = {
    "codes": np.ones((64, 8), np.int8),
    "scales": np.ones(8, np.float32),
    "bias": np.ones(8, np.float32),
    "step": np.float32(1 / 127),
    "zero": np.uint8(128),
    "least": np.float32(1e-20),
    "axes": np.array([-1]),
    "rotation": rotation_matrix(16),
    "parts": np.array([0, 0, 4, 16]),
    "whole": np.array([0, 0, 64]),
}
CHAIN = {  # output: operator and inputs
    "groups": ("Reshape", "x", "parts"),
    "turned": ("MatMul", "groups", "rotation"),
    "start": ("Reshape", "turned", "whole"),
    "size": ("Abs", "start"),
    "largest": ("ReduceMax", "size", "axes"),
    "peak": ("Add", "largest", "least"),
    "divided": ("Div", "start", "peak"),
    "rounded": ("QuantizeLinear", "divided", "step", "zero"),
    "product": ("MatMulIntegerToFloat", "rounded", "codes", "step", "scales", "zero"),
    "back": ("Mul", "product", "peak"),
    "y": ("Add", "back", "bias"),
}


def model_of(
    chain: dict[str, tuple[str, ...]], constants: dict[str, Any] | None = None, outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    attributes: dict[str, dict[str, Any]] = {
        "ReduceMax": {"keepdims": 1},
        "MatMulIntegerToFloat": {"domain": "com.microsoft"},
    }
    nodes = [
        helper.make_node(operator, inputs, [name], **attributes.get(operator, {}))
        for name, (operator, *inputs) in chain.items()
    ]
    arrays = {**CONSTANTS, **(constants or {})}
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "graph", [], ports, weights))


def nodes_of(model: onnx.ModelProto) -> list[tuple[str, str, list[str], list[str]]]:
    return [(node.domain, node.op_type, list(node.input), list(node.output)) for node in model.graph.node]


def test_rotation_rounding_and_bias_become_part_of_the_product() -> None:
    model = model_of(CHAIN)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert nodes_of(model) == [(DOMAIN, "Linear8", ["x", "codes", "scales", "rotation", "bias"], ["y"])]


def test_several_products_of_one_input() -> None:
    """Nodes that they share are removed with the last product that needs them, and stay if another node does."""
    second = {"product2": ("MatMulIntegerToFloat", *CHAIN["product"][1:]), "z": ("Mul", "product2", "peak")}
    model = model_of({**CHAIN, **second}, outputs=("y", "z"))
    assert use_kernels(model, FAST) == {"Linear8": 2}
    assert [(node.op_type, node.output[0]) for node in model.graph.node] == [("Linear8", "y"), ("Linear8", "z")]
    model = model_of({**CHAIN, "z": ("Neg", "start")}, outputs=("y", "z"))
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert [node.op_type for node in model.graph.node] == ["Reshape", "MatMul", "Reshape", "Linear8", "Neg"]


@pytest.mark.parametrize(
    ("change", "outputs", "inputs", "output"),
    [
        ({"groups": ("Identity", "x")}, ("y",), ["start", "codes", "scales", "", "bias"], "y"),  # no rotation
        ({}, ("y", "back"), ["x", "codes", "scales", "rotation"], "back"),
        ({"y": ("Add", "back", "other")}, ("y",), ["x", "codes", "scales", "rotation"], "back"),  # no bias
        ({"y": ("Add", "back", "back")}, ("y",), ["x", "codes", "scales", "rotation"], "back"),
    ],
    ids=["rotation", "output", "sum", "twice"],
)
def test_parts_that_differ_stay(
    change: dict[str, tuple[str, ...]], outputs: tuple[str, ...], inputs: list[str], output: str
) -> None:
    model = model_of({**CHAIN, **change}, outputs=outputs)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    found = next(node for node in nodes_of(model) if node[1] == "Linear8")
    assert found == (DOMAIN, "Linear8", inputs, [output])


SHAPE: list[str | int] = ["batch", "tokens", 64]
SILU: dict[str, tuple[str, ...]] = {"s": ("Sigmoid", "a"), "t": ("Mul", "a", "s")}


def typed(model: onnx.ModelProto, **shapes: list[str | int] | None) -> onnx.ModelProto:
    """The model with the shapes of values."""
    for name, shape in shapes.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize(
    ("before", "inputs", "activation"),
    [
        ({**SILU, "x": ("Mul", "t", "b")}, ["a", "b"], 1),
        ({**SILU, "x": ("Mul", "b", "t")}, ["a", "b"], 1),
        ({"s": SILU["s"], "x": ("Mul", "s", "a")}, ["a", ""], 1),
        ({"x": ("Gelu", "a")}, ["a", ""], 2),
        ({"t": ("Gelu", "a"), "x": ("Mul", "b", "t")}, ["a", "b"], 2),
    ],
    ids=["gate", "gate last", "silu", "gelu", "gelu gate"],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_activations_become_part_of_the_product(
    before: dict[str, tuple[str, ...]], inputs: list[str], activation: int, rotated: bool
) -> None:
    rest = CHAIN if rotated else {name: CHAIN[name] for name in list(CHAIN)[list(CHAIN).index("size") :]}
    chain = {**before, **rest, **({} if rotated else {"size": ("Abs", "x"), "divided": ("Div", "x", "peak")})}
    model = typed(model_of(chain), t=SHAPE, b=SHAPE)
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.attribute.append(helper.make_attribute("approximate", "tanh"))
    assert use_kernels(model, FAST) == {"Linear8": 1}
    wanted = [inputs[0], "codes", "scales", "rotation" if rotated else "", "bias", *([inputs[1]] if inputs[1] else [])]
    assert nodes_of(model) == [(DOMAIN, "Linear8", wanted, ["y"])]
    assert helper.get_attribute_value(model.graph.node[0].attribute[0]) == activation


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"x": ("Gelu", "a")}, {}),  # without tanh
        ({"s": ("Sigmoid", "b"), "x": ("Mul", "a", "s")}, {}),
        ({**SILU, "x": ("Mul", "t", "c")}, {}),  # a factor of another shape
        ({**SILU, "x": ("Mul", "t", "t")}, {}),
        ({"s": SILU["s"], "x": ("Mul", "a", "s")}, {"z": ("Neg", "x")}),
    ],
    ids=["erf", "sigmoid of another", "shape", "square", "use"],
)
def test_other_functions_stay(before: dict[str, tuple[str, ...]], after: dict[str, tuple[str, ...]]) -> None:
    model = typed(model_of({**before, **CHAIN, **after}, outputs=("y", *after)), t=SHAPE, b=SHAPE, c=[64])
    assert use_kernels(model, FAST) == {"Linear8": 1}
    found = next(node for node in model.graph.node if node.op_type == "Linear8")
    assert (found.input[0], len(found.input), list(found.attribute)) == ("x", 5, [])
    assert {node.output[0] for node in model.graph.node} >= {*before, *after}


def test_gelu_with_the_error_function_stays() -> None:
    model = model_of({"x": ("Gelu", "a"), **CHAIN})
    model.graph.node[0].attribute.append(helper.make_attribute("approximate", "none"))
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert [node.op_type for node in model.graph.node] == ["Gelu", "Linear8"]


@pytest.mark.parametrize("places", [("y", "r"), ("r", "y")])
def test_a_residual_becomes_part_of_the_product(places: tuple[str, str]) -> None:
    model = typed(model_of({**CHAIN, "z": ("Add", *places)}, outputs=("z",)), y=SHAPE, r=SHAPE)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert nodes_of(model) == [(DOMAIN, "Linear8", ["x", "codes", "scales", "rotation", "bias", "", "r"], ["z"])]


def test_two_products_that_meet_in_a_sum() -> None:
    """The sum becomes part of one of them; the other one is still computed."""
    second = {"product2": ("MatMulIntegerToFloat", *CHAIN["product"][1:]), "back2": ("Mul", "product2", "peak")}
    first = {name: CHAIN[name] for name in CHAIN if name != "y"}
    model = typed(model_of({**first, **second, "z": ("Add", "back", "back2")}, outputs=("z",)), back=SHAPE, back2=SHAPE)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    made = {name for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input if name}
    assert used - made - constants == {"x"}
    assert "z" in made


@pytest.mark.parametrize(
    ("after", "shape"),
    [
        ({"z": ("Add", "y", "r")}, [1, "tokens", 64]),  # would be broadcast
        ({"z": ("Add", "y", "r")}, None),
        ({"z": ("Add", "y", "y")}, SHAPE),
        ({"z": ("Add", "y", "r"), "w": ("Neg", "y")}, SHAPE),
    ],
    ids=["broadcast", "unknown", "twice", "use"],
)
def test_other_sums_stay(after: dict[str, tuple[str, ...]], shape: list[str | int] | None) -> None:
    model = typed(model_of({**CHAIN, **after}, outputs=tuple(after)), y=SHAPE, r=shape)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert nodes_of(model)[0] == (DOMAIN, "Linear8", ["x", "codes", "scales", "rotation", "bias"], ["y"])


@pytest.mark.parametrize(
    ("sizes", "axis", "attributes"),
    [
        ([32, 16, 16], -1, {"first": 32, "second": 16}),
        ([16, 48], 2, {"first": 16, "second": 48}),
        (2, -1, {"first": 32, "second": 32}),
        ([40, 24], -1, {}),
        ([16, 16, 16, 16], -1, {}),
        ([32, 32], 1, {}),
        (3, -1, {}),
        ([0, 64], -1, {}),
    ],
    ids=["three", "two", "halves", "not 16", "four", "axis", "thirds", "empty"],
)
def test_a_split_becomes_part_of_the_product(sizes: list[int] | int, axis: int, attributes: dict[str, int]) -> None:
    outputs = [f"y{place}" for place in range(sizes if isinstance(sizes, int) else len(sizes))]
    inputs = ["y"] if isinstance(sizes, int) else ["y", "sizes"]
    model = typed(model_of(CHAIN, {"sizes": np.array(sizes)}, tuple(outputs)), y=SHAPE)
    split = helper.make_node("Split", inputs, outputs, axis=axis)
    if isinstance(sizes, int):
        split.attribute.append(helper.make_attribute("num_outputs", sizes))
    model.graph.node.append(split)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    node = model.graph.node[0]
    assert {entry.name: entry.i for entry in node.attribute} == attributes
    assert list(node.output) == (outputs if attributes else ["y"])
    assert len(model.graph.node) == (1 if attributes else 2)


def test_a_bias_that_is_broadcast_stays() -> None:
    model = model_of(CHAIN, {"bias": np.ones(1, np.float32)})
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert [node.op_type for node in model.graph.node] == ["Linear8", "Add"]


@pytest.mark.parametrize("shapes", [{"parts": np.array([0, -1, 4, 16])}, {"whole": np.array([1, -1, 64])}])
def test_another_shape_is_no_rotation(shapes: dict[str, Any]) -> None:
    model = model_of(CHAIN, shapes)
    assert use_kernels(model, FAST) == {"Linear8": 1}
    assert [node.op_type for node in model.graph.node] == ["Reshape", "MatMul", "Reshape", "Linear8"]


@pytest.mark.parametrize(
    ("change", "constants", "outputs"),
    [
        ({}, {"step": np.float32(1 / 128)}, ("y",)),
        ({}, {"zero": np.uint8(127)}, ("y",)),
        ({}, {"least": np.float32(1e-5)}, ("y",)),
        ({}, {"axes": np.array([-2])}, ("y",)),
        ({}, {"codes": np.ones((64, 8), np.uint8)}, ("y",)),
        ({"size": ("Abs", "x")}, {}, ("y",)),
        ({"back": ("Mul", "product", "largest")}, {}, ("y",)),
        ({"back": ("Mul", "product", "product")}, {}, ("y",)),
        ({"rounded": ("QuantizeLinear", "divided", "scales", "zero")}, {}, ("y",)),
        ({}, {}, ("y", "product")),
        ({"also": ("Neg", "product")}, {}, ("y", "also")),
    ],
    ids=["step", "zero", "least", "axes", "uint8", "magnitude", "factor", "square", "other step", "output", "use"],
)
def test_other_chains_stay(
    change: dict[str, tuple[str, ...]], constants: dict[str, Any], outputs: tuple[str, ...]
) -> None:
    model = model_of({**CHAIN, **change}, constants, outputs)
    before = model.SerializeToString()
    assert not use_kernels(model, FAST)
    assert model.SerializeToString() == before


def test_a_value_that_a_branch_uses_is_kept() -> None:
    model = model_of(CHAIN)
    branch = helper.make_graph([helper.make_node("Neg", ["product"], ["n"])], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    assert not use_kernels(model, FAST)


def blocks(**changes: Any) -> onnx.ModelProto:
    chain = {name: CHAIN[name] for name in ("groups", "turned", "start")}
    arrays = {"codes": np.ones((8, 2, 32), np.uint8), "scales": np.ones((8, 2), np.float32)}
    model = model_of(chain, {**arrays, **changes.pop("arrays", {})})
    sizes = {"K": 64, "N": 8, "bits": 8, "block_size": 32, "accuracy_level": 4}
    names = ["start", "codes", "scales", *changes.pop("inputs", [])]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **{**sizes, **changes})
    model.graph.node.append(node)
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    return model


def test_products_by_8_bits_in_blocks_are_replaced() -> None:
    model = blocks()
    assert use_kernels(model, FAST) == {"Linear8Blocks": 1}
    assert nodes_of(model) == [(DOMAIN, "Linear8Blocks", ["x", "codes", "scales", "rotation"], ["y"])]
    found = {entry.name: helper.get_attribute_value(entry) for entry in model.graph.node[0].attribute}
    assert found == {"K": 64, "N": 8, "block_size": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_level": 1},  # fp32 activations
        {"inputs": ["zeros"]},
        {"arrays": {"scales": np.ones((8, 2), np.float16)}},
    ],
    ids=["fp32", "zeros", "fp16"],
)
def test_other_products_in_blocks_stay(changes: dict[str, Any]) -> None:
    assert not use_kernels(blocks(**changes), FAST)


def test_without_vnni_nothing_is_replaced() -> None:
    assert not use_kernels(model_of(CHAIN), Library("kernels.so", "avx2"))
