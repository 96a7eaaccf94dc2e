"""Products by 4-bit matrices against float64, and against onnxruntime's MatMulNBits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import vlpack_kernels

from conftest import session

COUNTS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 33, 49, 100]  # rows of x: both forms of the product, and all their ends
WIDE = 128  # columns that have a scale in the form for many rows, if blocks are smaller


class Matrix(NamedTuple):
    """A random 4-bit matrix: its arrays as MatMulNBits takes them, its numbers in float64, and its zero points."""

    arrays: dict[str, np.ndarray]
    numbers: np.ndarray
    points: np.ndarray
    block: int

    @classmethod
    def make(cls, rows: int, cols: int, block: int, zeros: bool, seed: int = 0) -> Matrix:
        random, blocks = np.random.default_rng(seed), -(-cols // block)
        codes = random.integers(0, 256, (rows, blocks, block // 2)).astype(np.uint8)
        arrays = {"codes": codes, "scales": random.uniform(-0.02, 0.02, (rows, blocks)).astype(np.float32)}
        points = np.full((rows, blocks), 8)
        if zeros:
            arrays["zeros"] = random.integers(0, 256, (rows, (blocks + 1) // 2)).astype(np.uint8)
            points = np.stack([arrays["zeros"] & 15, arrays["zeros"] >> 4], -1).reshape(rows, -1)[:, :blocks]
        unpacked = np.stack([codes & 15, codes >> 4], -1).reshape(rows, blocks, block).astype(np.float64)
        numbers = (unpacked - points[..., None]) * arrays["scales"][..., None]
        return cls(arrays, numbers.reshape(rows, -1)[:, :cols], points, block)

    def run(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        rows, cols = self.numbers.shape
        made = session("Linear4", ["x"], self.arrays, threads, K=cols, N=rows, block_size=self.block)
        return np.asarray(made.run(None, {"x": x})[0])

    @staticmethod
    def few(count: int) -> bool:
        """Whether the form for few rows of x computes so many rows."""
        return count <= (4 if vlpack_kernels.instruction_set() == "avx2" else 16)

    def bound(self, x: np.ndarray) -> np.ndarray:
        """The largest error that rounding can cause, [count, rows].

        Each block of x is rounded to steps of peak / 127. In the form for many rows of x, small blocks become wide, and
        the matrix is rounded to steps of 1/120 of the largest number that a wide block can have.
        """
        cols, few = self.numbers.shape[1], self.few(len(x)) or self.block >= WIDE
        total, wide = np.full((len(x), len(self.numbers)), 1e-6), self.block if few else WIDE
        for first in range(0, cols, wide):
            part = slice(first, min(first + wide, cols))
            step = np.abs(x[:, part]).max(1) / 127
            total += 0.501 * step[:, None] * np.abs(self.numbers[:, part]).sum(1)
            if not few:  # half a step, and what rounding a ratio of scales adds
                total += 0.51 * np.abs(x[:, part]).sum(1)[:, None] * self.largest[:, part].max(1) / 120
                total += 0.5 * step[:, None] * (part.stop - first) * self.largest[:, part].max(1) / 120
        return total + 1e-5 * np.abs(x) @ np.abs(self.numbers).T  # and sums in fp32

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude that the code of each number could have, times the scale, [rows, cols]."""
        points = self.points
        scales = np.abs(self.arrays["scales"]) * np.maximum(points, 15 - points)
        return np.repeat(scales, self.block, axis=1)[:, : self.numbers.shape[1]]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "block"),
    [
        (32, 128, 128),
        (7, 96, 32),
        (33, 100, 16),
        (65, 2048, 128),
        (5, 300, 64),
        (1, 1, 16),
        (40, 513, 256),
        (34, 3000, 32),
    ],
)
def test_it_is_close_to_float64(rows: int, cols: int, block: int, zeros: bool) -> None:
    matrix = Matrix.make(rows, cols, block, zeros)
    for count in COUNTS:
        x = np.random.default_rng(count).standard_normal((count, cols)).astype(np.float32)
        error = np.abs(matrix.run(x) - x.astype(np.float64) @ matrix.numbers.T)
        assert (error <= matrix.bound(x)).all(), count


def test_fuzzed_shapes() -> None:
    random = np.random.default_rng(2)
    for seed in range(60):
        block = int(random.choice([16, 32, 64, 128, 256]))
        rows, cols, count = (int(random.integers(1, top)) for top in (150, 900, 70))
        matrix = Matrix.make(rows, cols, block, bool(random.integers(2)), seed)
        x = (random.standard_normal((count, cols)) * np.exp(random.standard_normal((count, 1)))).astype(np.float32)
        error = np.abs(matrix.run(x, threads=2) - x.astype(np.float64) @ matrix.numbers.T)
        assert (error <= matrix.bound(x)).all(), (rows, cols, block, count)


@pytest.mark.parametrize(("count", "most"), [(1, 1.02), (50, 2.5)])
def test_its_error_beside_the_stock_operators(count: int, most: float) -> None:
    matrix = Matrix.make(64, 1024, 32, zeros=True)
    x = np.random.default_rng(3).standard_normal((count, 1024)).astype(np.float32)
    truth = x.astype(np.float64) @ matrix.numbers.T
    sizes = {"K": 1024, "N": 64, "block_size": 32, "bits": 4, "accuracy_level": 4}
    stock = session("MatMulNBits", ["x"], matrix.arrays, domain="com.microsoft", **sizes).run(None, {"x": x})[0]
    assert np.linalg.norm(matrix.run(x) - truth) <= most * np.linalg.norm(stock - truth)


def test_its_error_beside_that_of_4_bits() -> None:
    """Wide blocks are coarser than the stock operator's, but their error is small beside that of the codes."""
    random = np.random.default_rng(10)
    weight, x = random.standard_normal((64, 32, 32)), random.standard_normal((50, 1024)).astype(np.float32)
    scales = (np.abs(weight).max(2) / 7).astype(np.float32)
    codes = np.rint(weight / scales[..., None]).astype(np.uint8) + np.uint8(8)
    arrays = {"codes": codes[..., ::2] | codes[..., 1::2] << 4, "scales": scales}
    numbers = ((codes - 8.0) * scales[..., None]).reshape(64, 1024)
    matrix = Matrix(arrays, numbers, np.full((64, 32), 8), 32)
    error, rounding = matrix.run(x) - x @ numbers.T, x @ (numbers - weight.reshape(64, 1024)).T
    assert np.linalg.norm(error) <= 0.15 * np.linalg.norm(rounding)


@pytest.mark.parametrize("block", [128, 256])
def test_large_blocks_give_the_same_bits_in_both_forms(block: int) -> None:
    matrix = Matrix.make(50, 700, block, zeros=True)
    x = np.random.default_rng(11).standard_normal((40, 700)).astype(np.float32)
    np.testing.assert_array_equal(matrix.run(x), np.concatenate([matrix.run(row[None]) for row in x]))


@pytest.mark.parametrize("scale", [0.0, 1e-39, 1e-30, 1e30])
@pytest.mark.parametrize("count", [2, 20])
def test_blocks_of_very_different_scales(count: int, scale: float) -> None:
    """Also scales whose inverse is not a number of fp32."""
    matrix = Matrix.make(20, 512, 32, zeros=True)
    matrix.arrays["scales"][:, :8] *= np.float32(scale)
    matrix.arrays["scales"][3, 8:] *= np.float32(scale)
    points, wide = matrix.points, np.repeat(matrix.arrays["scales"].astype(np.float64), 32, axis=1)
    codes = matrix.arrays["codes"]
    unpacked = np.stack([codes & 15, codes >> 4], -1).reshape(20, -1).astype(np.float64)
    changed = matrix._replace(numbers=(unpacked - np.repeat(points, 32, axis=1)) * wide)
    x = np.random.default_rng(8).standard_normal((count, 512)).astype(np.float32)
    error = np.abs(changed.run(x) - x.astype(np.float64) @ changed.numbers.T)
    assert (error <= changed.bound(x)).all()


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("count", [1, 5, 9, 30])
def test_what_is_around_the_product(count: int, block: int) -> None:
    """A rotation and an activation before it, and a bias, a residual and a split after it."""
    random, size = np.random.default_rng(9), 64
    matrix = Matrix.make(80, 320, block, zeros=True)
    x, factor = (random.standard_normal((count, 320)).astype(np.float32) for _ in range(2))
    rotation = np.linalg.qr(random.standard_normal((size, size)))[0].astype(np.float32)
    bias, residual = random.standard_normal(80).astype(np.float32), random.standard_normal((count, 80))
    given = {**matrix.arrays, "rotation": rotation, "bias": bias, "factor": factor}
    given["residual"] = residual.astype(np.float32)
    sizes = {"K": 320, "N": 80, "block_size": block, "activation": 1, "first": 32, "second": 16}
    parts = session("Linear4", ["x"], given, 2, outputs=("y", "z", "w"), **sizes).run(None, {"x": x})
    assert [part.shape for part in parts] == [(count, 32), (count, 16), (count, 32)]
    activated = x / (1 + np.exp(-x.astype(np.float64))) * factor
    turned = (activated.reshape(count, -1, size) @ rotation).reshape(count, 320)
    error = np.abs(np.concatenate(parts, axis=1) - (turned @ matrix.numbers.T + bias + residual))
    assert (error <= matrix.bound(turned) + 1e-5).all()


@pytest.mark.parametrize("count", [3, 60])
def test_threads_do_not_change_the_result(count: int) -> None:
    matrix = Matrix.make(300, 256, 32, zeros=True)
    x = np.random.default_rng(4).standard_normal((count, 256)).astype(np.float32)
    first = matrix.run(x)
    for threads in (2, 3):
        np.testing.assert_array_equal(matrix.run(x, threads), first)


@pytest.mark.parametrize("count", [5, 40])
def test_rows_that_are_not_finite_stay_alone(count: int) -> None:
    matrix = Matrix.make(20, 64, 32, zeros=True)
    x = np.random.default_rng(5).standard_normal((count, 64)).astype(np.float32)
    clean = matrix.run(x)
    x[2, 40], x[3, 1], x[4] = np.nan, np.inf, 0
    y = matrix.run(x)
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[3]).any()
    assert not y[4].any()
    np.testing.assert_array_equal(np.delete(y, [2, 3, 4], 0), np.delete(clean, [2, 3, 4], 0))


def test_other_ranks_and_no_rows() -> None:
    matrix = Matrix.make(8, 32, 32, zeros=False)
    x = np.random.default_rng(6).standard_normal((2, 3, 32)).astype(np.float32)
    np.testing.assert_array_equal(matrix.run(x), matrix.run(x.reshape(6, 32)).reshape(2, 3, 8))
    assert matrix.run(x[:, :0]).shape == (2, 0, 8)
    assert matrix.run(x[0, 0]).shape == (8,)


def test_sizes_that_do_not_fit_are_errors() -> None:
    matrix = Matrix.make(8, 64, 32, zeros=True)
    with pytest.raises(Exception, match="last dimension of x is not K"):
        matrix.run(np.zeros((1, 63), np.float32))
    arrays = dict(matrix.arrays, scales=matrix.arrays["scales"][:, :1])
    with pytest.raises(Exception, match="does not have the size"):
        session("Linear4", ["x"], arrays, K=64, N=8, block_size=32).run(None, {"x": np.zeros((1, 64), np.float32)})
    with pytest.raises(Exception, match="block_size must be"):
        session("Linear4", ["x"], matrix.arrays, K=64, N=8, block_size=24)
