"""Products by 4-bit matrices against float64, and against onnxruntime's MatMulNBits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from conftest import session

COUNTS = [1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 33, 48, 49, 100]  # rows of x: both forms of the product, and all their ends


class Matrix(NamedTuple):
    """A random 4-bit matrix: its arrays as MatMulNBits takes them, and its numbers in float64 [rows, cols]."""

    arrays: dict[str, np.ndarray]
    numbers: np.ndarray
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
        return cls(arrays, numbers.reshape(rows, -1)[:, :cols], block)

    def run(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        rows, cols = self.numbers.shape
        made = session("Linear4", ["x"], self.arrays, threads, K=cols, N=rows, block_size=self.block)
        return np.asarray(made.run(None, {"x": x})[0])

    def bound(self, x: np.ndarray) -> np.ndarray:
        """The largest error that rounding each block of x to steps of peak / 127 can cause, [count, rows]."""
        cols = self.numbers.shape[1]
        total = np.full((len(x), len(self.numbers)), 1e-6)
        for first in range(0, cols, self.block):
            part = slice(first, min(first + self.block, cols))
            step = np.abs(x[:, part]).max(1) / 127
            total += 0.501 * step[:, None] * np.abs(self.numbers[:, part]).sum(1)
        return total + 1e-5 * np.abs(x) @ np.abs(self.numbers).T  # and sums in fp32


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


@pytest.mark.parametrize("count", [1, 50])
def test_it_is_as_accurate_as_the_stock_operator(count: int) -> None:
    matrix = Matrix.make(64, 1024, 32, zeros=True)
    x = np.random.default_rng(3).standard_normal((count, 1024)).astype(np.float32)
    truth = x.astype(np.float64) @ matrix.numbers.T
    sizes = {"K": 1024, "N": 64, "block_size": 32, "bits": 4, "accuracy_level": 4}
    stock = session("MatMulNBits", ["x"], matrix.arrays, domain="com.microsoft", **sizes).run(None, {"x": x})[0]
    assert np.linalg.norm(matrix.run(x) - truth) <= 1.02 * np.linalg.norm(stock - truth)


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
