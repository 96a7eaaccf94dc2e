"""Products by 8-bit matrices against float64, and against the nodes of onnxruntime that they replace."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from conftest import session

COUNTS = [*range(1, 19), 24, 31, 33, 70]  # rows of x: both forms of the product, and all their ends
SIZES = [(16, 64), (7, 96), (33, 100), (65, 2048), (5, 3), (1, 1), (48, 4), (130, 514), (50, 1000)]  # rows, cols


def rotated(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Groups of x multiplied by a matrix, float64; an empty matrix changes nothing."""
    groups = x.astype(np.float64).reshape(-1, len(rotation) or 1)
    return (groups @ rotation.astype(np.float64) if len(rotation) else groups).reshape(x.shape)


class Matrix(NamedTuple):
    """A random 8-bit matrix: its arrays as the operator takes them, and its numbers in float64 [rows, cols].

    Attributes:
        block: number of columns of a block; 0 if the scales are those of rows.
    """

    arrays: dict[str, np.ndarray]
    numbers: np.ndarray
    block: int

    @classmethod
    def make(cls, rows: int, cols: int, block: int = 0, group: int = 0, bias: bool = False, seed: int = 0) -> Matrix:
        random = np.random.default_rng(seed)
        rotation = np.linalg.qr(random.standard_normal((group, group)))[0].astype(np.float32)
        if block:
            blocks = -(-cols // block)
            codes = random.integers(0, 256, (rows, blocks, block)).astype(np.uint8)
            scales = random.uniform(-0.02, 0.02, (rows, blocks)).astype(np.float32)
            numbers = ((codes - 128.0) * scales[..., None]).reshape(rows, -1)[:, :cols]
        else:
            codes = random.integers(-127, 128, (cols, rows)).astype(np.int8)
            scales = random.uniform(-0.02, 0.02, rows).astype(np.float32)
            numbers = (codes * scales.astype(np.float64)).T
        arrays = {"codes": codes, "scales": scales}
        if group:
            arrays["rotation"] = rotation
        if bias:
            arrays["bias"] = random.standard_normal(rows).astype(np.float32)
        return cls(arrays, numbers, block)

    def run(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        rows, cols = self.numbers.shape
        sizes = {"K": cols, "N": rows, "block_size": self.block} if self.block else {}
        made = session("Linear8Blocks" if self.block else "Linear8", ["x"], self.inputs(), threads, **sizes)
        return np.asarray(made.run(None, {"x": x})[0])

    def inputs(self) -> dict[str, np.ndarray | None]:
        """The arrays in the order of the inputs; None for one that is not given."""
        return {name: self.arrays.get(name) for name in ("codes", "scales", "rotation", "bias")}

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotated rows, float64."""
        return rotated(x, self.arrays.get("rotation", np.zeros((0, 0))))

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The product in float64."""
        return self.turned(x) @ self.numbers.T + self.arrays.get("bias", 0)

    def bound(self, x: np.ndarray) -> np.ndarray:
        """The largest error that rounding each block or row of x to steps of peak / 127 can cause, [count, rows]."""
        x, cols = self.turned(x), self.numbers.shape[1]
        total = np.full((len(x), len(self.numbers)), 1e-6)
        for first in range(0, cols, self.block or cols):
            part = slice(first, min(first + (self.block or cols), cols))
            step = np.abs(x[:, part]).max(1) / 127
            total += 0.501 * step[:, None] * np.abs(self.numbers[:, part]).sum(1)
        return total + 1e-5 * np.abs(x) @ np.abs(self.numbers).T  # and sums in fp32


def fused(
    matrix: Matrix,
    x: np.ndarray,
    factor: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    outputs: tuple[str, ...] = ("y",),
    **attributes: int,
) -> list[np.ndarray]:
    """The outputs of the operator together with the nodes around the product."""
    names = {**matrix.inputs(), "factor": factor, "residual": residual}
    if matrix.block:
        rows, cols = matrix.numbers.shape
        attributes |= {"K": cols, "N": rows, "block_size": matrix.block}
    made = session("Linear8Blocks" if matrix.block else "Linear8", ["x"], names, 2, outputs=outputs, **attributes)
    return [np.asarray(y) for y in made.run(None, {"x": x})]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.minimum(-x, 700)))


ACTIVATIONS = {1: lambda x: x * sigmoid(x), 2: lambda x: x * sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3))}


def stock(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """What the nodes of an int8 package compute."""
    given = matrix.arrays
    cols, size = x.shape[1], len(given.get("rotation", []))
    weights = {"axes": np.array([-1]), "least": np.float32(1e-20), "step": np.float32(1 / 127), "zero": np.uint8(128)}
    weights |= {"parts": np.array([0, cols // (size or 1), size]), "whole": np.array([0, cols])}
    make, microsoft = helper.make_node, "com.microsoft"
    turn = [
        make("Reshape", ["x", "parts"], ["groups"]),
        make("MatMul", ["groups", "rotation"], ["turned"]),
        make("Reshape", ["turned", "whole"], ["start"]),
    ]
    product = make("MatMulIntegerToFloat", ["q", "codes", "step", "scales", "zero"], ["product"], domain=microsoft)
    nodes = [
        *(turn if size else [make("Identity", ["x"], ["start"])]),
        make("Abs", ["start"], ["size"]),
        make("ReduceMax", ["size", "axes"], ["largest"], keepdims=1),
        make("Add", ["largest", "least"], ["peak"]),
        make("Div", ["start", "peak"], ["divided"]),
        make("QuantizeLinear", ["divided", "step", "zero"], ["q"]),
        product,
        make("Mul", ["product", "peak"], ["back"]),
        make("Add", ["back", "bias"], ["y"]) if "bias" in given else make("Identity", ["back"], ["y"]),
    ]
    port = helper.make_tensor_value_info
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in {**weights, **given}.items()]
    graph = helper.make_graph(nodes, "graph", [port("x", 1, None)], [port("y", 1, None)], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(microsoft, 1)]
    text = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    made = ort.InferenceSession(text, providers=["CPUExecutionProvider"])
    return np.asarray(made.run(None, {"x": x})[0])


def rows_of(count: int, cols: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, cols)) * np.exp(random.standard_normal((count, 1)))).astype(np.float32)


@pytest.mark.parametrize("block", [0, 16, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_it_is_close_to_float64(rows: int, cols: int, block: int) -> None:
    matrix = Matrix.make(rows, cols, block)
    for count in COUNTS:
        x = rows_of(count, cols, count)
        assert (np.abs(matrix.run(x) - matrix.exact(x)) <= matrix.bound(x)).all(), count


def test_fuzzed_shapes() -> None:
    random = np.random.default_rng(1)
    for seed in range(60):
        group = int(random.integers(1, 140))
        rows, groups, count = (int(random.integers(1, top)) for top in (150, 2 + 1000 // group, 70))
        block = int(random.choice([0, 16, 32, 48, 256]))
        given = group if random.integers(2) else 0
        matrix = Matrix.make(rows, groups * group, block, given, bool(random.integers(2)), seed)
        x = rows_of(count, groups * group, seed)
        error = np.abs(matrix.run(x, threads=2) - matrix.exact(x))
        assert (error <= matrix.bound(x)).all(), (rows, groups, group, block, count)


@pytest.mark.parametrize("group", [0, 20, 64, 80])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_its_bits_are_those_of_the_stock_nodes(count: int, bias: bool, group: int) -> None:
    matrix = Matrix.make(100, 320, group=group, bias=bias)
    x = rows_of(count, 320)
    x[0, :3] = np.abs(x[0]).max() * np.array([0.5, 1.5, 2.5]) / 127  # ties, or as near as fp32 can be
    x[-1, 7:] = 0
    np.testing.assert_array_equal(matrix.run(x), stock(matrix, x))


@pytest.mark.parametrize(("core", "doublings"), [(32, 1), (32, 2), (48, 1), (16, 3), (20, 2), (1, 7)])
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("block", [0, 32])
def test_rotations_that_were_made_by_doubling(core: int, doublings: int, count: int, block: int) -> None:
    """Sums and differences of halves come first, and then a smaller matrix."""
    rotation = np.linalg.qr(np.random.default_rng(core).standard_normal((core, core)))[0]
    for _ in range(doublings):
        rotation = np.block([[rotation, rotation], [rotation, -rotation]]) / np.sqrt(2)
    matrix = Matrix.make(40, 3 * len(rotation), block)
    matrix.arrays["rotation"] = rotation.astype(np.float32)
    x = rows_of(count, 3 * len(rotation))
    assert (np.abs(matrix.run(x) - matrix.exact(x)) <= matrix.bound(x)).all()
    changed = rotation.astype(np.float32)
    changed[-1, -1] *= -1  # no longer of this form, only in the last place
    matrix.arrays["rotation"] = changed
    assert (np.abs(matrix.run(x) - matrix.exact(x)) <= matrix.bound(x)).all()


@pytest.mark.parametrize("count", [1, 50])
def test_blocks_are_as_accurate_as_the_stock_operator(count: int) -> None:
    matrix = Matrix.make(64, 1024, 64)
    x = rows_of(count, 1024)
    sizes = {"K": 1024, "N": 64, "block_size": 64, "bits": 8, "accuracy_level": 4}
    stock = session("MatMulNBits", ["x"], matrix.arrays, domain="com.microsoft", **sizes).run(None, {"x": x})[0]
    assert np.linalg.norm(matrix.run(x) - matrix.exact(x)) <= 1.02 * np.linalg.norm(stock - matrix.exact(x))


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("count", [3, 60])
def test_threads_do_not_change_the_result(count: int, block: int) -> None:
    matrix = Matrix.make(300, 512, block, 64)
    x = rows_of(count, 512)
    first = matrix.run(x)
    for threads in (2, 3):
        np.testing.assert_array_equal(matrix.run(x, threads), first)


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("count", [5, 40])
def test_rows_that_are_not_finite_stay_alone(count: int, block: int) -> None:
    matrix = Matrix.make(20, 64, block, 32)
    x = rows_of(count, 64)
    clean = matrix.run(x)
    x[2, 40], x[3, 1], x[4] = np.nan, np.inf, 0
    y = matrix.run(x)
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[3]).any()
    assert not y[4].any()
    np.testing.assert_array_equal(np.delete(y, [2, 3, 4], 0), np.delete(clean, [2, 3, 4], 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [0, 20, 64])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_activations(count: int, block: int, group: int, gated: bool, activation: int) -> None:
    """SiLU and GELU with tanh, perhaps times another value, before the rotation."""
    matrix = Matrix.make(40, 320 if group else 333, block, group, bias=True)
    x = 3 * rows_of(count, matrix.numbers.shape[1])
    x[0, :4] = 0, -90, 90, -5
    factor = rows_of(*x.shape, 1) if gated else None
    activated = ACTIVATIONS[activation](x.astype(np.float64)) * (1 if factor is None else factor)
    y = fused(matrix, x, factor, activation=activation)[0]
    assert (np.abs(y - matrix.exact(activated)) <= matrix.bound(activated)).all()
    alone = matrix.run(activated.astype(np.float32))  # differs only where the last bits decide how a value is rounded
    assert np.linalg.norm(y - alone) <= 1e-3 * np.linalg.norm(alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_very_large_values(activation: int) -> None:
    matrix = Matrix.make(20, 64)
    x = np.zeros((4, 64), np.float32)
    x[0, 5], x[1, 5], x[2, 5], x[3, 5] = 1e20, -1e20, np.inf, np.nan
    y = fused(matrix, x, activation=activation)[0]
    np.testing.assert_allclose(y[0], matrix.numbers[:, 5] * 1e20, rtol=0.01)
    assert not y[1].any()
    assert not np.isfinite(y[2]).any()
    assert np.isnan(y[3]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_residual_is_added_last(count: int, bias: bool) -> None:
    matrix = Matrix.make(100, 320, bias=bias)
    x, residual = rows_of(count, 320), rows_of(count, 100, 1)
    np.testing.assert_array_equal(fused(matrix, x, residual=residual)[0], stock(matrix, x) + residual)


@pytest.mark.parametrize("sizes", [(96,), (32, 64), (16, 80), (48, 32, 16), (16, 16, 69), (64, 37)])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_parts_of_the_product_are_outputs(count: int, sizes: tuple[int, ...]) -> None:
    matrix, outputs = Matrix.make(sum(sizes), 100, bias=True), ("y", "z", "w")[: len(sizes)]
    x = rows_of(count, 100).reshape(1, count, 100)
    parts = fused(matrix, x, outputs=outputs, first=sizes[0], **({"second": sizes[1]} if len(sizes) > 1 else {}))
    assert [part.shape for part in parts] == [(1, count, size) for size in sizes]
    np.testing.assert_array_equal(np.concatenate(parts, axis=2)[0], stock(matrix, x[0]))


def test_tiny_and_huge_rows() -> None:
    matrix = Matrix.make(20, 64)
    x = rows_of(4, 64)
    x[0] *= 1e-30
    x[1] *= 1e-39
    x[2] *= 1e35
    np.testing.assert_array_equal(matrix.run(x), stock(matrix, x))


@pytest.mark.parametrize("block", [0, 32])
def test_other_ranks_and_no_rows(block: int) -> None:
    matrix = Matrix.make(8, 32, block)
    x = rows_of(6, 32).reshape(2, 3, 32)
    np.testing.assert_array_equal(matrix.run(x), matrix.run(x.reshape(6, 32)).reshape(2, 3, 8))
    assert matrix.run(x[:, :0]).shape == (2, 0, 8)
    assert matrix.run(x[0, 0]).shape == (8,)


def test_sizes_that_do_not_fit_are_errors() -> None:
    matrix = Matrix.make(8, 64, bias=True)
    x = np.zeros((1, 64), np.float32)
    with pytest.raises(Exception, match="last dimension of x is not K"):
        matrix.run(x[:, :63])
    for name in ("scales", "bias"):
        changed = matrix._replace(arrays={**matrix.arrays, name: matrix.arrays[name][:7]})
        with pytest.raises(Exception, match="does not have the size"):
            changed.run(x)
    for shape in ((0, 0), (3, 3), (2, 4), (128, 128)):
        arrays = {**Matrix.make(8, 64).arrays, "rotation": np.zeros(shape, np.float32)}
        with pytest.raises(Exception, match="rotation must be"):
            session("Linear8", ["x"], arrays).run(None, {"x": x})
    for name in ("factor", "residual"):
        with pytest.raises(Exception, match="does not have the size"):
            fused(matrix, x, **{name: np.zeros((1, 63), np.float32)}, activation=1)
    with pytest.raises(Exception, match="factor needs an activation"):
        fused(matrix, x, np.ones((1, 64), np.float32))
    with pytest.raises(Exception, match="activation must be"):
        fused(matrix, x, activation=3)
    wide = Matrix.make(64, 64)
    for sizes in ({"first": 8}, {"first": 80}, {"first": -16}, {"first": 16, "second": 8}, {"first": 32, "second": 48}):
        with pytest.raises(Exception, match="first and second must be"):
            fused(wide, x, outputs=("y", "z", "w"), **sizes)
    blocks = Matrix.make(8, 64, 32)
    with pytest.raises(Exception, match="block_size must be"):
        session("Linear8Blocks", ["x"], blocks.arrays, K=64, N=8, block_size=24)
    with pytest.raises(Exception, match="does not have the size"):
        session("Linear8Blocks", ["x"], blocks.arrays, K=96, N=8, block_size=32)
