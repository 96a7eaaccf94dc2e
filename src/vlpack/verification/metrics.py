"""Measures of the difference between two arrays, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRAPH_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
"""Largest relative L2 error of a stage that rounding alone explains if the weights are equal, by dtype of activations.
In fp32 the tests measure 3e-6, and 2e-5 at the sizes of an 8B model; the rest is room for the outliers of trained
models. The smallest fault that was tried causes 5e-4."""

QUANTIZED_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.15, "int4": 1.0}
"""Largest relative L2 error of a stage that quantization alone explains, against the original weights, by precision; a
larger one means a fault. SmolLM2 has 0.07 in int8 and 0.38 in int4; random weights of 36 layers reach 0.89 in int4. The
cost of quantization is judged by `KL_TOLERANCE`."""

KL_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.03, "int4": 0.8}
"""Largest mean Kullback-Leibler divergence of the next token's distribution, in nats, by precision. On the built-in
prompts, SmolLM2 with and without planted outliers has at most 0.012 in int8 and 0.53 in int4. Without balance and
rotation, int8 has 0.073, or 1.5 with outliers, and int4 1.4 with outliers. int4 has room for models of fewer than 14
layers, which keep no layer in 8 bits, and for larger blocks (docs/results.md)."""

TYPICAL_KL = {"8 bits": (0.004, 0.015), "4 bits": (0.04, 0.4)}
"""Mean divergences that other tools' packages of SmolLM2 have, in nats: in 8 bits from llama.cpp's Q8_0 to OpenVINO's
int8, in 4 bits from llama.cpp's Q4_K_M with an importance matrix to OpenVINO's int4 (docs/benchmarks.md)."""


def describe_kl(kl: float) -> str:
    """A sentence for the user that compares a package's divergence with what 8 and 4 bits usually cost.

    Args:
        kl: mean Kullback-Leibler divergence of the next token's distribution, in nats.
    """
    (low8, high8), (low4, high4) = TYPICAL_KL.values()
    if kl < low8:
        beside = "nearer than 8 bits usually are"
    elif kl <= high8:
        beside = "as near as 8 bits usually are"
    elif kl < low4:
        beside = "between what 8 bits and what 4 bits usually cost"
    elif kl <= high4:
        beside = "as near as 4 bits usually are"
    else:
        beside = "farther than 4 bits usually are"
    return (
        f"The next token's distribution is {kl:.2g} nats from the model's: {beside} "
        f"(8 bits {low8:g} to {high8:g}, 4 bits {low4:g} to {high4:g})."
    )


@dataclass(frozen=True)
class Difference:
    """The difference between two arrays of the same shape, computed in float64.

    Args:
        relative: relative L2 error, ``|value - reference| / |reference|``.
        largest: largest absolute difference of an element.
        cosine: cosine of the angle between the arrays; 1 if both are zero.
    """

    relative: float
    largest: float
    cosine: float


_PIECE = 1 << 20
"""Number of values compared at a time: an embedding has 600 million, too many to copy in float64."""


class Gap:
    """Computes a `Difference` of arrays that come piece by piece; a value that is not finite makes it infinite."""

    def __init__(self) -> None:
        self._gap = self._value = self._reference = self._product = self._largest = 0.0

    def add(self, value: Array, reference: Array) -> None:
        """Add the next piece of both arrays.

        Raises:
            ValueError: the two pieces differ in shape.
        """
        if np.shape(value) != np.shape(reference):
            raise ValueError(f"{np.shape(value)} is not {np.shape(reference)}")
        value, reference = np.ravel(value), np.ravel(reference)
        for start in range(0, value.size, _PIECE):
            a = value[start : start + _PIECE].astype(np.float64)
            b = reference[start : start + _PIECE].astype(np.float64)
            self._value, self._reference = self._value + float(a @ a), self._reference + float(b @ b)
            self._product += float(a @ b)
            with np.errstate(invalid="ignore"):  # infinity minus infinity, which `difference` handles
                a -= b
            self._gap += float(a @ a)
            self._largest = max(self._largest, float(np.abs(a, out=a).max()))

    @property
    def difference(self) -> Difference:
        """The difference over all pieces added so far."""
        if not np.isfinite([self._value, self._reference, self._gap]).all():
            return Difference(float("inf"), float("inf"), float("nan"))
        gap, a, b = (float(np.sqrt(square)) for square in (self._gap, self._value, self._reference))
        relative = gap / b if b else (0.0 if gap == 0 else float("inf"))
        return Difference(relative, self._largest, self._product / (a * b) if a and b else float(a == b))


def difference(value: Array, reference: Array) -> Difference:
    """Compare two arrays of the same shape; a value that is not finite makes the difference infinite."""
    gap = Gap()
    gap.add(value, reference)
    return gap.difference


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models' next-token distributions at every position of a prompt and its answer.

    Args:
        kl: ``KL(reference ‖ package)`` in nats, by position.
        same_top: whether both models have the same most likely token, by position.
    """

    kl: list[float]
    same_top: list[bool]

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence over all positions, in nats; 0 without positions."""
        return float(np.mean(self.kl)) if self.kl else 0.0

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token; 1 without positions."""
        return float(np.mean(self.same_top)) if self.same_top else 1.0


def agreement(value: Array, reference: Array) -> Agreement:
    """Compare two models' logits ``[S, V]``, row by row so that no second copy of them is needed."""
    kl, same = [], []
    for row, wanted in zip(value, reference, strict=True):
        p, q = _log_softmax(wanted), _log_softmax(row)
        divergence = float(np.sum(np.exp(p) * (p - q)))
        kl.append(max(divergence, 0.0) if np.isfinite(divergence) else float("inf"))  # max would turn NaN into 0
        same.append(int(np.argmax(row)) == int(np.argmax(wanted)))
    return Agreement(kl, same)


def _log_softmax(row: Array) -> Array:
    row = np.asarray(row, np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits, for which the divergence is infinite
        row = row - row.max()
    return np.asarray(row - np.log(np.exp(row).sum()))
