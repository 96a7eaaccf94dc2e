"""How far two arrays are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRAPH_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
"""Relative L2 that rounding alone makes of a stage, by the dtype of activations, weights being equal. At fp32 the tests
see 3e-6, and 2e-5 where the sizes are an 8B's; trained models have outliers. The smallest fault tried makes 5e-4."""

QUANTIZED_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.15, "int4": 1.0}
"""Relative L2 of features and logits against the original weights, by precision: beyond it something is broken, not
merely rounded. SmolLM2 has 0.07 in int8 and 0.38 in int4; random weights of 36 layers reach 0.89 in int4. What
quantization costs is judged by `KL_TOLERANCE`."""

KL_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.03, "int4": 0.8}
"""Mean Kullback-Leibler divergence of the next token's distribution, in nats, by precision. On the built-in prompts
SmolLM2, as it is and with outliers planted, has at most 0.012 in int8 and 0.61 in int4 (0.42 without them); int8
without balance and rotation has 0.073 as it is and 1.5 with outliers, and int4 1.1 (docs/results.md)."""

TYPICAL_KL = {"8 bits": (0.004, 0.015), "4 bits": (0.04, 0.4)}
"""What peers' packages of SmolLM2 have, from llama.cpp's Q8_0 to OpenVINO's int8, and from llama.cpp's Q4_K_M with an
importance matrix to OpenVINO's int4 (docs/benchmarks.md)."""


def nearness(kl: float) -> str:
    """One sentence that says how near a package is to its model, beside what 8 and 4 bits usually cost.

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
    """Two arrays of one shape, compared in float64.

    Args:
        relative: ``|value - reference| / |reference|``, L2.
        largest: the largest absolute difference.
        cosine: of the angle between them; 1 where both are zero.
    """

    relative: float
    largest: float
    cosine: float


_PIECE = 1 << 20
"""Values that are compared at a time: an embedding has 600 million, of which no copies in float64 can be made."""


class Gap:
    """A `Difference` in the making: arrays come piece by piece, and anything not finite makes them infinitely apart."""

    def __init__(self) -> None:
        self._gap = self._value = self._reference = self._product = self._largest = 0.0

    def add(self, value: Array, reference: Array) -> None:
        """The next piece of both, of one shape."""
        if np.shape(value) != np.shape(reference):
            raise ValueError(f"{np.shape(value)} is not {np.shape(reference)}")
        value, reference = np.ravel(value), np.ravel(reference)
        for start in range(0, value.size, _PIECE):
            a = value[start : start + _PIECE].astype(np.float64)
            b = reference[start : start + _PIECE].astype(np.float64)
            self._value, self._reference = self._value + float(a @ a), self._reference + float(b @ b)
            self._product += float(a @ b)
            with np.errstate(invalid="ignore"):  # infinity less infinity: told in `difference`
                a -= b
            self._gap += float(a @ a)
            self._largest = max(self._largest, float(np.abs(a, out=a).max()))

    @property
    def difference(self) -> Difference:
        """Of all pieces."""
        if not np.isfinite([self._value, self._reference, self._gap]).all():
            return Difference(float("inf"), float("inf"), float("nan"))
        gap, a, b = (float(np.sqrt(square)) for square in (self._gap, self._value, self._reference))
        relative = gap / b if b else (0.0 if gap == 0 else float("inf"))
        return Difference(relative, self._largest, self._product / (a * b) if a and b else float(a == b))


def difference(value: Array, reference: Array) -> Difference:
    """Compare two arrays of the same shape; anything not finite makes them infinitely far apart."""
    gap = Gap()
    gap.add(value, reference)
    return gap.difference


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
        """Over all positions; 0 where there are none."""
        return float(np.mean(self.kl)) if self.kl else 0.0

    @property
    def top1(self) -> float:
        """Share of positions with the same likeliest token; 1 where there are none."""
        return float(np.mean(self.same_top)) if self.same_top else 1.0


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
