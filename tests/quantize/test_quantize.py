"""Quantization of single matrices: bounds of rounding errors, and the layouts that onnxruntime's operators read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from vlpack.quantize.blocks import block_shapes, dequantize_blocks, quantize_blocks, unpack
from vlpack.quantize.channels import dequantize_rows, quantize_rows
from vlpack.quantize.storage import ChannelInt8, slabs

SIZES = [16, 32, 64, 128, 256]
FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=FLOATS)


def random(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A random matrix with rows of very different magnitudes, a zero row, and a row of one sign."""
    weight = np.random.default_rng(seed).normal(0, 1, (rows, cols)).astype(np.float32)
    weight *= np.logspace(-3, 2, rows, dtype=np.float32)[:, None]
    weight[1] = 0
    weight[2] = np.abs(weight[2])
    return weight


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 500))
def test_slabs_cover_a_matrix_in_as_few_equal_parts_as_fit(rows: int, cols: int, elements: int) -> None:
    found = list(slabs(rows, cols, elements))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    most = max(1, elements // cols)
    assert all(stop - start <= most for start, stop in found)
    lengths = [stop - start for start, stop in found]
    assert max(lengths, default=0) - min(lengths, default=0) <= len(found)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_alone_are_those_of_the_codes(symmetric: bool, narrow: bool) -> None:
    weight = random(9, 200)
    whole, grids = (
        quantize_blocks(weight.copy(), 4, 32, symmetric, narrow=narrow, grids_only=only) for only in (False, True)
    )
    assert (grids.true_scales == whole.true_scales).all()
    assert grids.qweight.shape == whole.qweight.shape
    if not symmetric:
        assert grids.zero_points is not None
        assert (grids.zero_points == whole.zero_points).all()


@settings(deadline=None, max_examples=100)
@given(MATRICES, st.sampled_from([4, 8]), st.sampled_from(SIZES), st.booleans())
def test_blocks_round_to_the_nearest_code(weight, bits, block_size, symmetric):
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
        assert blocks.zero_points is not None
        assert blocks.zero_points.shape == shapes.zero_points
    back = dequantize_blocks(blocks, cols, bits)
    assert back.dtype == np.float32
    assert back.shape == weight.shape
    assert (back[weight == 0] == 0).all()
    step = np.repeat(np.abs(blocks.scales), block_size, axis=1)[:, :cols].astype(np.float64)
    tiny = 1e-5 * np.abs(weight).max(axis=1, keepdims=True)
    moved = np.abs(back.astype(np.float64) - weight)
    if bits == 8:
        # zero must be on an asymmetric grid, so the zero point is rounded, which shifts the ends of the grid
        assert (moved <= (0.5 if symmetric else 1.0) * step + tiny).all()
        return
    # values have the nearest code; errors above half a step occur only beyond the ends of the grid
    codes = np.rint(back / np.where(step > 0, step, 1))
    ends = [np.repeat(end, block_size, axis=1)[:, :cols] for end in reach(blocks)]
    inside = (codes > ends[0]) & (codes < ends[1])
    assert (moved <= np.where(inside, 0.5 * step, np.inf) + tiny).all()
    # by the weighted error, no block is worse than on the grid that spans its range
    padded = np.pad(weight.astype(np.float64), ((0, 0), (0, n * block_size - cols))).reshape(rows, n, block_size)
    ours = np.pad(back.astype(np.float64), ((0, 0), (0, n * block_size - cols))).reshape(rows, n, block_size)
    plain = rounded_to_range(padded, symmetric)
    size = (np.abs(padded) ** 3).sum(axis=2)
    assert (counted(ours, padded) <= counted(plain, padded) + 2e-6 * size).all()


def reach(blocks) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest whole step that the codes of 4-bit blocks reach."""
    zeros: Any = 8.0
    if blocks.zero_points is not None:
        packed = blocks.zero_points
        zeros = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, : blocks.scales.shape[1]]
    low, high = -zeros * np.ones_like(blocks.scales), (15.0 - zeros) * np.ones_like(blocks.scales)
    down = blocks.scales < 0
    return np.where(down, -high, low), np.where(down, -low, high)


def rounded_to_range(blocks: np.ndarray, symmetric: bool) -> np.ndarray:
    """4-bit blocks [.., size], rounded to the grid that spans their range."""
    top, bottom = blocks.max(axis=-1, keepdims=True), blocks.min(axis=-1, keepdims=True)
    if symmetric:
        scales, zeros = np.where(top > -bottom, top, bottom) / -8, 8
        scales[scales == 0] = 1
    else:
        scales = (np.maximum(top, 0) - np.minimum(bottom, 0)) / 15
        scales[scales == 0] = 1
        zeros = np.clip(np.rint(-np.minimum(bottom, 0) / scales), 0, 15)
    return scales * (np.clip(np.rint(blocks / scales) + zeros, 0, 15) - zeros)


def counted(values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The weighted error that `quantize_blocks` minimizes, for each block."""
    return (np.abs(blocks) * (values - blocks) ** 2).sum(axis=-1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_do_not_depend_on_other_rows_or_the_dtype(symmetric: bool, bits: int) -> None:
    """Single rows, which have fewer values than are rounded at a time, and bfloat16 give the same codes."""
    weight = random(300, 1000).astype(ml_dtypes.bfloat16)
    whole = quantize_blocks(weight, bits, 32, symmetric)
    for start in range(0, 300, 50):
        rows = slice(start, start + 50)
        alone = quantize_blocks(weight[rows].astype(np.float32), bits, 32, symmetric)
        assert np.array_equal(alone.qweight, whole.qweight[rows])
        assert np.array_equal(alone.scales, whole.scales[rows])
        if not symmetric:
            assert alone.zero_points is not None
            assert whole.zero_points is not None
            assert np.array_equal(alone.zero_points, whole.zero_points[rows])


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_chosen_grid_is_better_than_the_range_s(symmetric: bool, block_size: int) -> None:
    """The chosen grid has smaller errors than the grid of the block's range, both weighted and plain squared ones."""
    weight = np.random.default_rng(0).normal(0, 0.02, (256, 4096)).astype(np.float32)
    back = dequantize_blocks(quantize_blocks(weight, 4, block_size, symmetric), 4096, 4)
    blocks = weight.astype(np.float64).reshape(256, -1, block_size)
    ours, plain = back.astype(np.float64).reshape(blocks.shape), rounded_to_range(blocks, symmetric)
    assert counted(ours, blocks).sum() < 0.97**2 * counted(plain, blocks).sum()
    assert np.linalg.norm(ours - blocks) < 0.98 * np.linalg.norm(plain - blocks)


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_on_a_grid_are_kept_exactly(symmetric: bool) -> None:
    """Dequantized 4-bit checkpoints therefore lose nothing."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (64, 8, 64))
    codes[..., :2] = (0, 15)  # the whole range is used
    zeros = 8 if symmetric else random.integers(0, 16, (64, 8, 1))
    weight = ((codes - zeros) * random.uniform(0.001, 1, (64, 8, 1))).reshape(64, 512).astype(np.float32)
    back = dequantize_blocks(quantize_blocks(weight, 4, 64, symmetric), 512, 4)
    assert np.allclose(back, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-37, 2e-41])
def test_huge_and_denormal_values(bits: int, symmetric: bool, size: float) -> None:
    shape = np.random.default_rng(0).uniform(-1, 1, (4, 128))
    weight = (shape * size).astype(np.float32)
    blocks = quantize_blocks(weight, bits, 64, symmetric)
    back = dequantize_blocks(blocks, 128, bits)
    assert np.isfinite(blocks.scales).all()
    # denormal numbers have few significant bits
    bound = (0.12 if bits == 4 else 0.01) + (0.01 if size > 1e-38 else 0.2)
    assert np.linalg.norm(back.astype(np.float64) / size - shape) < bound * np.linalg.norm(shape)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_affect_only_their_block(value: float, symmetric: bool) -> None:
    """The reader of checkpoints refuses NaN and infinity; here they do not spread, and the block's scale shows them."""
    weight = random(4, 256)
    clean = quantize_blocks(weight, 4, 64, symmetric)
    weight[3, 70] = value
    found = quantize_blocks(weight, 4, 64, symmetric)
    assert not np.isfinite(found.scales[3, 1])
    others = np.ones((4, 4), bool)
    others[3, 1] = False
    assert np.array_equal(found.scales[others], clean.scales[others])
    assert np.array_equal(found.qweight[others], clean.qweight[others])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_does_not_depend_on_blocks_rounded_with_it(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are rounded independently, so the division into slabs, tiles and threads does not matter."""
    weight = random(70, 300)
    whole = quantize_blocks(weight, bits, 64, symmetric)
    monkeypatch.setattr("vlpack.quantize.blocks.TILE", 7 * 64)
    pieces = [quantize_blocks(weight[start : start + 3], bits, 64, symmetric) for start in range(0, 70, 3)]
    for name in ("qweight", "scales", *([] if symmetric else ["zero_points"])):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        assert np.array_equal(getattr(whole, name), joined), name


@settings(deadline=None, max_examples=100)
@given(MATRICES)
def test_rounding_by_rows_is_within_half_a_step(weight):
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
    # the largest magnitude of a row is at the end of its grid
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
def test_zero_points_help_if_values_have_one_sign(bits):
    weight = np.abs(random(8, 64))
    errors = [
        np.linalg.norm(dequantize_blocks(quantize_blocks(weight, bits, 32, symmetric), 64, bits) - weight)
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


def run(node, inputs: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Runs one of onnxruntime's own operators."""
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
def test_onnxruntime_reads_the_layout_of_blocks(bits, symmetric, block_size, cols):
    weight = random(12, cols)
    blocks = quantize_blocks(weight.copy(), bits, block_size, symmetric)
    wanted = dequantize_blocks(blocks, cols, bits)
    arrays = {"qweight": blocks.qweight, "scales": blocks.scales}
    if blocks.zero_points is not None:
        arrays["zero_points"] = blocks.zero_points
    multiply = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft",
        K=cols, N=12, bits=bits, block_size=block_size, accuracy_level=1,
    )  # fmt: skip
    # multiplied by the identity, the result is the weight itself
    assert np.allclose(run(multiply, arrays, {"x": np.eye(cols, dtype=np.float32)}).T, wanted, rtol=1e-6, atol=0)
    look_up = helper.make_node(
        "GatherBlockQuantized", ["qweight", "ids", *list(arrays)[1:]], ["y"], domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    arrays["qweight"] = blocks.qweight.reshape(12, -1)
    rows = run(look_up, arrays, {"ids": np.arange(12, dtype=np.int64)})
    assert np.allclose(rows[:, :cols], wanted, rtol=1e-6, atol=0)
    assert not rows[:, cols:].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_codes_are_for_the_scales_that_are_stored(size: float, symmetric: bool) -> None:
    """The codes are chosen for scales that are rounded to 8 bits, so that errors do not grow."""
    weight = np.random.default_rng(3).normal(0, size, (40, 128)).astype(np.float32)
    exact, narrow = (quantize_blocks(weight, 4, 32, symmetric, rotated=True, narrow=narrow) for narrow in (False, True))
    assert narrow.scales.dtype == np.int8
    assert (np.abs(narrow.scales).max(axis=1) == 127).all()
    errors = [np.abs(dequantize_blocks(blocks, 128, 4) - weight) / size for blocks in (exact, narrow)]
    zeros: Any = 8
    if narrow.zero_points is not None:
        zeros = unpack(narrow.zero_points, 4)[:, :4, None]
    assert (narrow.zero_points is None) == symmetric
    codes = np.arange(16) - zeros
    grids = (codes * narrow.true_scales[..., None]).reshape(40, 4, 1, 16)
    nearest = np.abs(grids - weight.reshape(40, 4, 32, 1)).min(axis=-1).reshape(40, 128) / size
    np.testing.assert_allclose(errors[1], nearest, rtol=0, atol=1e-5)
    assert np.linalg.norm(errors[1]) < 1.003 * np.linalg.norm(errors[0])


@pytest.mark.parametrize("signed", [True, False])
def test_onnxruntime_reads_the_layout_of_rows(signed: bool) -> None:
    """Multiplied by the identity, signed and unsigned codes give the weight itself."""
    weight = random(12, 64)
    arrays, zeros = {}, ["a_zero"] if signed else ["a_zero", "b_zero"]
    for name, chunk in ChannelInt8(signed).chunks(lambda start, stop: weight[start:stop], 12, 64):
        arrays[name] = chunk
    constants = {"one": np.array(1, np.float32), "a_zero": np.array(128, np.uint8), "b_zero": np.array(128, np.uint8)}
    multiply = helper.make_node(
        "MatMulIntegerToFloat", ["x", "qweight", "one", "scales", *zeros], ["y"], domain="com.microsoft"
    )
    used: dict[str, Any] = {name: value for name, value in constants.items() if name in ("one", *zeros)}
    product = run(multiply, arrays | used, {"x": np.eye(64, dtype=np.uint8) + np.uint8(128)})
    wanted = dequantize_rows(*quantize_rows(weight.copy()))
    assert np.allclose(product.T, wanted, rtol=1e-6, atol=0)
    assert np.array_equal(ChannelInt8(signed).values(arrays, 12, 64, 3, 7), wanted[3:7])
