"""Attention without a mask against float64."""

from __future__ import annotations

import numpy as np
import pytest
import vlpack_kernels

from conftest import session

# largest relative error of a number in bfloat16, and of the sum of a few hundred products in fp32
ROUNDING = 2**-9 if vlpack_kernels.instruction_set() == "avx512_bf16" else 2**-20

SHAPES = [  # batch, queries, keys, heads, channels
    (1, 1, 1, 1, 1),
    (2, 5, 3, 2, 7),
    (1, 47, 65, 3, 72),
    (1, 48, 64, 2, 64),
    (3, 50, 129, 2, 80),
    (1, 100, 200, 1, 128),
    (1, 33, 333, 1, 33),
    (2, 17, 1, 2, 8),
]


def heads_of(x: np.ndarray, heads: int) -> np.ndarray:
    return x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, scale: float) -> np.ndarray:
    q, k, v = (heads_of(x, heads) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


def bound(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, scale: float) -> float:
    """The largest error that rounding q, k, v and the exponentials can cause."""
    q, k, v = (np.abs(heads_of(x, heads)) for x in (q, k, v))
    scores = 2.1 * ROUNDING * (q @ k.transpose(0, 1, 3, 2) * scale).max()
    return float((np.expm1(2 * scores) + 3 * ROUNDING) * v.max())


def arrays(shape: tuple[int, ...], size: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    batch, queries, keys, heads, channels = shape
    random = np.random.default_rng(seed)
    counts = (queries, keys, keys)
    return [(random.standard_normal((batch, n, heads * channels)) * size).astype(np.float32) for n in counts]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_close_to_float64(shape: tuple[int, ...], threads: int) -> None:
    q, k, v = arrays(shape)
    heads, scale = shape[3], shape[4] ** -0.5
    y = session("Attention", ["q", "k", "v"], {}, threads, num_heads=heads, scale=0.0).run(
        None, {"q": q, "k": k, "v": v}
    )[0]
    error = y - exact(q, k, v, heads, scale)
    assert np.abs(error).max() <= bound(q, k, v, heads, scale)


def test_the_error_of_many_keys_is_small() -> None:
    """The relative error of Gaussian inputs, which docs/kernels.md states."""
    q, k, v = arrays((1, 96, 500, 2, 64))
    y = session("Attention", ["q", "k", "v"], {}, num_heads=2, scale=0.0).run(None, {"q": q, "k": k, "v": v})[0]
    truth = exact(q, k, v, 2, 1 / 8)
    limit = 5e-3 if ROUNDING > 1e-3 else 2e-6
    assert np.linalg.norm(y - truth) <= limit * np.linalg.norm(truth)


def test_fuzzed_shapes_and_scales() -> None:
    random = np.random.default_rng(1)
    for seed in range(40):
        shape = tuple(int(random.integers(1, top)) for top in (3, 120, 200, 4, 100))
        scale = float(random.uniform(0.02, 0.3))
        q, k, v = arrays(shape, float(random.uniform(0.1, 2)), seed)
        run = session("Attention", ["q", "k", "v"], {}, 2, num_heads=shape[3], scale=scale)
        y = run.run(None, {"q": q, "k": k, "v": v})[0]
        assert np.abs(y - exact(q, k, v, shape[3], scale)).max() <= bound(q, k, v, shape[3], scale), shape


def test_large_scores_choose_one_key() -> None:
    keys, channels = 150, 64
    k = np.zeros((1, keys, channels), np.float32)
    k[0, np.arange(channels) + 50, np.arange(channels)] = 1000
    q = np.eye(channels, dtype=np.float32)[None] * 1000
    v = np.arange(keys * channels, dtype=np.float32).reshape(1, keys, channels) % 127  # exact in bfloat16
    y = session("Attention", ["q", "k", "v"], {}, num_heads=1, scale=1.0).run(None, {"q": q, "k": k, "v": v})[0]
    np.testing.assert_allclose(y[0], v[0, 50 : 50 + channels], rtol=1e-6)


def test_a_nan_stays_in_its_query() -> None:
    q, k, v = arrays((1, 60, 70, 2, 16))
    run = session("Attention", ["q", "k", "v"], {}, num_heads=2, scale=0.0)
    clean = run.run(None, {"q": q, "k": k, "v": v})[0]
    q[0, 20, 3] = np.nan  # of the first head
    y = run.run(None, {"q": q, "k": k, "v": v})[0]
    assert np.isnan(y[0, 20, :16]).all()
    y[0, 20, :16] = clean[0, 20, :16]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_and_no_keys(queries: int, keys: int) -> None:
    q, k, v = arrays((2, queries, keys, 2, 8))
    y = session("Attention", ["q", "k", "v"], {}, num_heads=2, scale=0.0).run(None, {"q": q, "k": k, "v": v})[0]
    assert y.shape == (2, queries, 16)
    assert not y.any()


def test_shapes_that_do_not_fit_are_errors() -> None:
    q, k, v = arrays((1, 4, 6, 2, 8))
    run = session("Attention", ["q", "k", "v"], {}, num_heads=2, scale=0.0)
    with pytest.raises(Exception, match="the same length"):
        run.run(None, {"q": q, "k": k, "v": v[:, :5]})
    with pytest.raises(Exception, match="three dimensions"):
        run.run(None, {"q": q[0], "k": k, "v": v})
    with pytest.raises(Exception, match="not a multiple of num_heads"):
        session("Attention", ["q", "k", "v"], {}, num_heads=3, scale=0.0).run(None, {"q": q, "k": k, "v": v})
    with pytest.raises(Exception, match="num_heads must be positive"):
        session("Attention", ["q", "k", "v"], {}, num_heads=0, scale=0.0)
