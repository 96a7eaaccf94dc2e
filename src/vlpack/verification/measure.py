"""How far two arrays are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRAPH_TOLERANCE = {"float32": 3e-5, "float16": 2e-2}
"""Relative L2 that rounding alone makes of a stage, by the dtype of activations, weights being equal. At fp32 the tests
see 3e-6; real models are deeper and have outliers."""

QUANTIZED_TOLERANCE = {"fp32": 3e-5, "fp16": 2e-2, "int8": 0.15, "int4": 0.6}
"""Relative L2 of features and logits against the original weights, by precision: beyond it something is broken, not
merely rounded. What quantization costs is judged by `KL_TOLERANCE`."""

KL_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.15, "int4": 1.0}
"""Mean Kullback-Leibler divergence of the next token's distribution, in nats, likewise."""


@dataclass(frozen=True)
class Difference:
    """Two arrays of one shape, compared in float64.

    Args:
        relative: ``|value - reference| / |reference|``, L2.
        largest: the largest absolute difference.
        cosine: of the angle between them; 1 where both are zero.
    """

    relative: float
    largest: float
    cosine: float


def difference(value: Array, reference: Array) -> Difference:
    """Compare two arrays of the same shape; anything not finite makes them infinitely far apart."""
    a, b = np.asarray(value, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    if a.shape != b.shape:
        raise ValueError(f"{np.shape(value)} is not {np.shape(reference)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(float("inf"), float("inf"), float("nan"))
    gap, size_a, size_b = float(np.linalg.norm(a - b)), float(np.linalg.norm(a)), float(np.linalg.norm(b))
    relative = gap / size_b if size_b else (0.0 if gap == 0 else float("inf"))
    cosine = float(a @ b / (size_a * size_b)) if size_a and size_b else float(size_a == size_b)
    return Difference(relative, float(np.abs(a - b).max(initial=0.0)), cosine)


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions at every position of a prompt and its answer.

    Args:
        kl: ``KL(reference ‖ package)`` in nats, by position.
        same_top: whether both like the same token best, by position.
    """

    kl: list[float]
    same_top: list[bool]

    @property
    def mean_kl(self) -> float:
        """Over all positions."""
        return float(np.mean(self.kl))

    @property
    def top1(self) -> float:
        """Share of positions with the same likeliest token."""
        return float(np.mean(self.same_top))


def agreement(value: Array, reference: Array) -> Agreement:
    """Compare logits ``[S, V]`` row by row, so that no second copy of them is needed."""
    kl, same = [], []
    for row, wanted in zip(value, reference, strict=True):
        p, q = _log_softmax(wanted), _log_softmax(row)
        divergence = float(np.sum(np.exp(p) * (p - q)))
        kl.append(max(divergence, 0.0) if np.isfinite(divergence) else float("inf"))  # max would make 0 of NaN
        same.append(int(np.argmax(row)) == int(np.argmax(wanted)))
    return Agreement(kl, same)


def _log_softmax(row: Array) -> Array:
    row = np.asarray(row, np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits, whose distance is infinite
        row = row - row.max()
    return np.asarray(row - np.log(np.exp(row).sum()))
