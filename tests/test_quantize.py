"""Quantization by itself: how far values may move, and that onnxruntime's operators read the layouts alike."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from vlpack.quantize.blocks import block_shapes, dequantize_blocks, quantize_blocks
from vlpack.quantize.channel import dequantize_rows, quantize_rows
from vlpack.storage import ChannelInt8

SIZES = [16, 32, 64, 128, 256]
FLOATS = st.floats(-1e4, 1e4, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=FLOATS)


def random(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A matrix with rows of very different sizes, a zero row, and a row of one sign."""
    weight = np.random.default_rng(seed).normal(0, 1, (rows, cols)).astype(np.float32)
    weight *= np.logspace(-3, 2, rows, dtype=np.float32)[:, None]
    weight[1] = 0
    weight[2] = np.abs(weight[2])
    return weight


@settings(deadline=None, max_examples=100)
@given(MATRICES, st.sampled_from([4, 8]), st.sampled_from(SIZES), st.booleans())
def test_blocks_move_values_by_half_a_step_at_most(weight, bits, block_size, symmetric):
    rows, cols = weight.shape
    n = -(-cols // block_size)
    blocks = quantize_blocks(weight.copy(), bits, block_size, symmetric)
    shapes = block_shapes(rows, cols, bits, block_size)
    assert blocks.qweight.shape == shapes.qweight == (rows, n, block_size * bits // 8)
    assert blocks.scales.shape == shapes.scales == (rows, n)
    assert blocks.qweight.dtype == np.uint8
    assert blocks.scales.dtype == np.float32
    if symmetric:
        assert blocks.zero_points is None
    else:
        assert blocks.zero_points.shape == shapes.zero_points
    back = dequantize_blocks(blocks, cols, bits)
    assert back.dtype == np.float32
    assert back.shape == weight.shape
    step = np.repeat(np.abs(blocks.scales), block_size, axis=1)[:, :cols].astype(np.float64)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    moved = np.abs(back.astype(np.float64) - weight)
    if symmetric and bits == 4:
        # the grid has 8 steps on the side of the largest value and 7 on the other, whose end is cut
        block = np.pad(weight, ((0, 0), (0, n * block_size - cols))).reshape(rows, n, block_size)
        cut = np.minimum(np.abs(block.max(axis=2)), np.abs(block.min(axis=2))) > 7.5 * np.abs(blocks.scales)
        step = np.where(np.repeat(cut, block_size, axis=1)[:, :cols], 2 * step, step)
    # zero must be on the grid of asymmetric blocks, so their zero point is rounded; the ends give way by that much
    share = 0.5 if symmetric else 1.0
    assert (moved <= share * step + 1e-5 * largest).all()
    assert (back[weight == 0] == 0).all()


@settings(deadline=None, max_examples=100)
@given(MATRICES)
def test_rows_move_values_by_half_a_step_at_most(weight):
    codes, scales = quantize_rows(weight.copy())
    assert codes.shape == weight.shape
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert scales.shape == weight.shape[:1]
    assert scales.dtype == np.float32
    back = dequantize_rows(codes, scales)
    moved = np.abs(back.astype(np.float64) - weight)
    assert (moved <= 0.5 * scales[:, None].astype(np.float64) + 1e-5 * np.abs(weight).max(axis=1, keepdims=True)).all()
    assert (back[weight == 0] == 0).all()
    # the largest value of a row is the end of its grid
    ends = np.abs(weight).argmax(axis=1)[:, None]
    assert np.allclose(np.take_along_axis(back, ends, 1), np.take_along_axis(weight, ends, 1), rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_row_stays_zero(bits, symmetric):
    blocks = quantize_blocks(np.zeros((3, 40), np.float32), bits, 32, symmetric)
    assert np.isfinite(blocks.scales).all()
    assert (blocks.scales != 0).all()
    assert not dequantize_blocks(blocks, 40, bits).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_pay_off_where_values_have_one_sign(bits):
    weight = np.abs(random(8, 64))
    errors = [
        np.linalg.norm(dequantize_blocks(quantize_blocks(weight, bits, 32, symmetric), 64, bits) - weight)
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


def run(node, inputs: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    """One of onnxruntime's own operators."""
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    types[np.dtype(np.uint8)] = TensorProto.UINT8
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, types[value.dtype], value.shape) for name, value in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


@pytest.mark.parametrize("cols", [32, 64, 100, 300])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_reads_blocks_alike(bits, symmetric, block_size, cols):
    weight = random(12, cols)
    blocks = quantize_blocks(weight.copy(), bits, block_size, symmetric)
    wanted = dequantize_blocks(blocks, cols, bits)
    arrays = {"qweight": blocks.qweight, "scales": blocks.scales}
    if not symmetric:
        arrays["zero_points"] = blocks.zero_points
    multiply = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft",
        K=cols, N=12, bits=bits, block_size=block_size, accuracy_level=1,
    )  # fmt: skip
    # the identity's product is the weight itself
    assert np.allclose(run(multiply, arrays, {"x": np.eye(cols, dtype=np.float32)}).T, wanted, rtol=1e-6, atol=0)
    look_up = helper.make_node(
        "GatherBlockQuantized", ["qweight", "ids", *list(arrays)[1:]], ["y"], domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    arrays["qweight"] = blocks.qweight.reshape(12, -1)
    rows = run(look_up, arrays, {"ids": np.arange(12, dtype=np.int64)})
    assert np.allclose(rows[:, :cols], wanted, rtol=1e-6, atol=0)
    assert not rows[:, cols:].any()


@pytest.mark.parametrize("signed", [True, False])
def test_onnxruntime_reads_rows_alike(signed: bool) -> None:
    """The identity's product is the weight itself, from bytes of either kind."""
    weight = random(12, 64)
    arrays, zeros = {}, ["a_zero"] if signed else ["a_zero", "b_zero"]
    for name, chunk in ChannelInt8(signed).chunks(lambda start, stop: weight[start:stop], 12, 64):
        arrays[name] = chunk
    constants = {"one": np.array(1, np.float32), "a_zero": np.array(128, np.uint8), "b_zero": np.array(128, np.uint8)}
    multiply = helper.make_node(
        "MatMulIntegerToFloat", ["x", "qweight", "one", "scales", *zeros], ["y"], domain="com.microsoft"
    )
    used = {name: value for name, value in constants.items() if name in ("one", *zeros)}
    product = run(multiply, arrays | used, {"x": np.eye(64, dtype=np.uint8) + np.uint8(128)})
    wanted = dequantize_rows(*quantize_rows(weight.copy()))
    assert np.allclose(product.T, wanted, rtol=1e-6, atol=0)
    assert np.array_equal(ChannelInt8(signed).values(arrays, 12, 64, 3, 7), wanted[3:7])
