"""Which nodes vlpack-kernels' operators replace, and when. The operators themselves are tested in kernels/tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from vlpack.ort.kernels import DOMAIN, SWITCH, Library, library, use_kernels

FAST = Library("kernels.so", "avx512_bf16")


def graph(operator: str, inputs: int, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    names = [f"x{place}" for place in range(inputs)]
    node = helper.make_node(operator, names, ["y"], domain="com.microsoft", **attributes)
    made = helper.make_graph([node], "graph", [], [], value_info=[helper.make_tensor_value_info("y", kind, None)])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("com.microsoft", 1)])


def attention(inputs: int = 3, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    return graph("MultiHeadAttention", inputs, kind, **{"num_heads": 4, **attributes})


def product(inputs: int = 3, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    sizes = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
    return graph("MatMulNBits", inputs, kind, **{**sizes, **attributes})


def attributes_of(model: onnx.ModelProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in model.graph.node[0].attribute}


def test_attention_without_a_mask_is_replaced() -> None:
    model = attention(scale=0.5)
    assert use_kernels(model, FAST) == {"Attention": 1}
    assert (model.graph.node[0].domain, attributes_of(model)) == (DOMAIN, {"num_heads": 4, "scale": 0.5})
    assert [(entry.domain, entry.version) for entry in model.opset_import][-1] == (DOMAIN, 1)


@pytest.mark.parametrize("inputs", [3, 4])
def test_products_by_4_bits_are_replaced(inputs: int) -> None:
    model = product(inputs)
    assert use_kernels(model, FAST) == {"Linear4": 1}
    assert (model.graph.node[0].domain, attributes_of(model)) == (DOMAIN, {"K": 64, "N": 8, "block_size": 32})


@pytest.mark.parametrize(
    "model",
    [
        attention(5),  # with a mask
        attention(unidirectional=1),
        attention(kind=TensorProto.FLOAT16),
        product(bits=8),
        product(accuracy_level=1),  # fp32 activations
        product(inputs=5),  # with an order of columns
        product(kind=TensorProto.FLOAT16),
    ],
)
def test_other_nodes_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert not use_kernels(model, FAST)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("instruction_set", "replaced"), [("avx512_bf16", (1, 1)), ("avx512", (0, 1)), ("avx2", (0, 0))]
)
def test_only_what_is_faster_is_replaced(instruction_set: str, replaced: tuple[int, int]) -> None:
    slower = Library("kernels.so", instruction_set)
    assert (use_kernels(attention(), slower).total(), use_kernels(product(), slower).total()) == replaced


def test_without_the_library_nothing_is_replaced() -> None:
    assert not use_kernels(attention(), None)


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vlpack_kernels")
    fake.instruction_set = lambda: "avx512"  # type: ignore[attr-defined]
    fake.library = lambda: Path("kernels.so")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlpack_kernels", fake)
    monkeypatch.delenv(SWITCH, raising=False)
    assert library() == Library("kernels.so", "avx512")
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None


def test_a_processor_without_kernels_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vlpack_kernels")
    fake.instruction_set = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlpack_kernels", fake)
    monkeypatch.delenv(SWITCH, raising=False)
    assert library() is None
