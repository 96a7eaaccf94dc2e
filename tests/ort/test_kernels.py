"""Which nodes vlpack-kernels' operators replace, and when. The operators themselves are tested in kernels/tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import vlpack
from samples import ANSWERS, DIGITS, IMAGES, READ
from samples import vlpack as run_vlpack
from vlpack.errors import PackageError
from vlpack.ort.kernels import CHOICE, DOMAIN, INTERFACE, SWITCH, Library, library, use_kernels
from vlpack.server.models import Models
from vlpack.server.settings import Settings

FAST = Library("kernels.so", "avx512_bf16")
SLOW = Library("kernels.so", "avx512")


def graph(
    operator: str, inputs: int, kind: int = TensorProto.FLOAT, output: str = "y", **attributes: Any
) -> onnx.ModelProto:
    names = [f"x{place}" for place in range(inputs)]
    node = helper.make_node(operator, names, [output], domain="com.microsoft", **attributes)
    y = helper.make_tensor_value_info(output, kind, None)
    made = helper.make_graph([node], "graph", [], [y], value_info=[y])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("com.microsoft", 1)])


def attention(inputs: int = 3, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    return graph("MultiHeadAttention", inputs, kind, **{"num_heads": 4, **attributes})


def product(inputs: int = 3, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    sizes = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
    return graph("MatMulNBits", inputs, kind, "product", **{**sizes, **attributes})


def causal(inputs: int = 7, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    sizes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 0}
    made = graph("GroupQueryAttention", inputs, kind, **{**sizes, **attributes})
    made.graph.node[0].output.extend(["key", "value"])
    return made


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


def test_causal_attention_is_replaced() -> None:
    model = causal()
    assert use_kernels(model, FAST) == {"GroupQueryAttention": 1}
    found = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.0, "exact": 1}
    assert (model.graph.node[0].domain, attributes_of(model)) == (DOMAIN, found)


@pytest.mark.parametrize(
    ("others", "exact"),
    [
        ([], 1),
        ([product()], 0),
        ([product(accuracy_level=1)], 1),  # 4-bit weights, fp32 activations
        ([graph("MatMulIntegerToFloat", 5)], 0),
        ([graph("MatMul", 2)], 1),
    ],
    ids=["none", "4-bits", "4-bits-fp32", "8-bits", "fp32"],
)
def test_causal_attention_rounds_only_where_the_graph_does(others: list[onnx.ModelProto], exact: int) -> None:
    model = causal()
    model.graph.node.extend(node for other in others for node in other.graph.node)
    use_kernels(model, FAST)
    assert attributes_of(model)["exact"] == exact


def test_one_quantized_product_among_many_layers_does_not_make_attention_round() -> None:
    """For instance a quantized head of an fp32 model."""
    model = causal()
    model.graph.node.extend([*causal().graph.node, *product().graph.node])
    use_kernels(model, FAST)
    assert attributes_of(model)["exact"] == 1


def cached(rounds: bool = True) -> onnx.ModelProto:
    """Causal attention whose cache is an input and an output of the graph, with a product that rounds activations."""
    model = causal()
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x3", "x4"))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("key", "value"))
    model.graph.node.extend(product().graph.node if rounds else [])
    return model


def cache_kinds(model: onnx.ModelProto) -> set[int]:
    ports = [value for value in [*model.graph.input, *model.graph.output] if value.name != "y"]
    return {value.type.tensor_type.elem_type for value in ports}


def test_a_cache_becomes_bfloat16() -> None:
    model = cached()
    assert use_kernels(model, FAST)["NarrowGroupQueryAttention"] == 1
    assert attributes_of(model) == {"num_heads": 4, "kv_num_heads": 2, "scale": 0.0}
    assert cache_kinds(model) == {TensorProto.BFLOAT16}


@pytest.mark.parametrize("reason", ["fp32", "processor", "shared", "used", "inner"])
def test_a_cache_that_stays_fp32(reason: str) -> None:
    model = cached(rounds=reason != "fp32")
    if reason == "shared":  # by two layers
        model.graph.node.extend([*causal().graph.node, *product().graph.node])
    elif reason == "used":  # by another node, after the call
        model.graph.node.append(helper.make_node("Identity", ["key"], ["copy"]))
    elif reason == "inner":  # quantized keys and values are not the graph's own
        del model.graph.input[0]
    counts = use_kernels(model, SLOW if reason == "processor" else FAST)
    assert counts["GroupQueryAttention"] == 1 + (reason == "shared")
    assert counts["NarrowGroupQueryAttention"] == 0
    assert cache_kinds(model) == {TensorProto.FLOAT}


def test_causal_attention_in_a_branch_is_replaced() -> None:
    """An int8 cache has the attention of several new tokens in a branch."""
    branch = causal().graph
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=graph("MatMul", 2).graph)
    model = helper.make_model(helper.make_graph([node], "graph", [], []))
    assert use_kernels(model, FAST) == {"GroupQueryAttention": 1}
    branches = {entry.name: entry.g for entry in model.graph.node[0].attribute}
    assert branches["then_branch"].node[0].domain == DOMAIN


@pytest.mark.parametrize(
    "model",
    [
        attention(5),  # with a mask
        attention(unidirectional=1),
        attention(kind=TensorProto.FLOAT16),
        causal(9),  # with a rotary embedding's tables
        causal(do_rotary=1),
        causal(local_window_size=128),
        causal(kind=TensorProto.FLOAT16),
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
    ("instruction_set", "replaced"), [("avx512_bf16", (1, 1, 1)), ("avx512", (0, 1, 1)), ("avx2", (0, 0, 0))]
)
def test_only_what_is_faster_is_replaced(instruction_set: str, replaced: tuple[int, int, int]) -> None:
    slower = Library("kernels.so", instruction_set)
    assert tuple(use_kernels(model, slower).total() for model in (attention(), product(), causal())) == replaced


def test_without_the_library_nothing_is_replaced() -> None:
    assert not use_kernels(attention(), None)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that installs a module in place of vlpack-kernels, with an instruction set and an interface number.

    A module of interface None is as old as the first one, which has no number.
    """

    def install(instruction_set: str | None = "avx512", interface: int | None = INTERFACE) -> None:
        fake = ModuleType("vlpack_kernels")
        fake.instruction_set = lambda: instruction_set  # type: ignore[attr-defined]
        fake.library = lambda: Path("kernels.so")  # type: ignore[attr-defined]
        if interface is not None:
            fake.interface = lambda: interface  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vlpack_kernels", fake)

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(CHOICE, raising=False)
    return install


def test_it_can_be_turned_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    assert library() == Library("kernels.so", "avx512")
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None


def test_a_processor_without_kernels_has_no_library(install: Install) -> None:
    for interface in (INTERFACE, None):  # no kernels could be used, so their version does not matter
        install(None, interface)
        assert library() is None


def test_an_instruction_set_without_kernels_is_an_error(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(None)
    monkeypatch.setenv(CHOICE, "neon")
    with pytest.raises(PackageError, match="no kernels for VLPACK_KERNELS_ISA=neon"):
        library()


@pytest.mark.parametrize(
    ("interface", "said"),
    [(None, "older than this vlpack (interface 1 "), (1, "older "), (INTERFACE + 1, "newer ")],
    ids=["none", "older", "newer"],
)
def test_another_interface_is_an_error(
    interface: int | None, said: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(interface=interface)
    with pytest.raises(PackageError) as caught:
        library()
    assert f"vlpack-kernels is {said}" in caught.value.message
    assert "pip install ./kernels" in str(caught.value.hint)
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None


def test_what_an_old_library_stops(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would use the library is refused with the sentence alone, inspect says it, and the stock runtime works."""
    package, text, embedder = (tmp_path / name for name in ("package", "text", "embedder"))
    vlpack.build(DIGITS, package, precision="int8")
    vlpack.build(DIGITS, text, precision="int8", part="text")
    vlpack.build(DIGITS, embedder, precision="int8", task="embedding")
    install(interface=None)
    sentence = "The installed vlpack-kernels is older than this vlpack"

    for answer in (
        ("run", package, READ),  # before an image is encoded
        ("run", package, READ, "--image", IMAGES / "00.png"),
        ("embed", embedder, "Hello"),
    ):
        done = run_vlpack(capsys, *answer)
        assert done.code == 2
        assert done.err.startswith(f"error: {sentence}"), done.err
    for folder in (package, text):
        with pytest.raises(PackageError, match=f"^{sentence}"):
            vlpack.Engine(folder)
        with pytest.raises(PackageError, match=f"^{sentence}"):  # at the start, not with the first request
            Models({"name": folder}, Settings())

    assert f"kernels cannot be used: {sentence}" in run_vlpack(capsys, "inspect", package).out
    done = run_vlpack(capsys, "run", text, "Hello", "--max-tokens", "1", "--stats")
    assert (done.code, "kernels" in done.err) == (0, False)
    monkeypatch.setenv(SWITCH, "0")
    assert "kernels" not in run_vlpack(capsys, "inspect", package).out
    done = run_vlpack(capsys, "run", package, READ, "--image", IMAGES / "00.png")
    assert done.out.split() == ANSWERS["00.png"]["read"].split()
