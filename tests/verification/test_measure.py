"""Differences and bounds: values that are not finite differ infinitely; stages without weights have one bound."""

from __future__ import annotations

import numpy as np
import pytest

from vlpack.verification.metrics import Difference, agreement, difference
from vlpack.verification.result import Stage

FAR, NEAR = Difference(0.1, 1.0, 1.0), Difference(1e-6, 1.0, 1.0)


def test_difference() -> None:
    apart = difference(np.array([3.0, 4.0]), np.array([3.0, 3.0]))
    assert apart.relative == pytest.approx(1 / 18**0.5)
    assert apart.largest == 1
    assert difference(np.zeros(3), np.zeros(3)) == Difference(0.0, 0.0, 1.0)
    assert difference(np.ones(3), np.zeros(3)).relative == np.inf
    assert difference(np.array([np.nan]), np.ones(1)).relative == np.inf
    with pytest.raises(ValueError, match="is not"):
        difference(np.ones(3), np.ones((3, 1, 2)))


def test_agreement() -> None:
    logits = np.array([[0.0, 1.0], [2.0, 0.0]])
    same = agreement(logits, logits + 5)  # adding a constant to logits changes no distribution
    assert same.mean_kl == pytest.approx(0, abs=1e-12)
    assert same.top1 == 1
    other = agreement(np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]]))
    assert other.mean_kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    for bad in (np.nan, np.inf):
        assert agreement(np.array([[bad, 0.0]]), np.zeros((1, 2))).mean_kl == np.inf


@pytest.mark.parametrize(
    ("graph", "total", "wrong"),
    [
        (NEAR, NEAR, None),
        (NEAR, FAR, None),  # quantization
        (FAR, FAR, (FAR, 1e-4)),
        (NEAR, Difference(0.7, 1.0, 1.0), (Difference(0.7, 1.0, 1.0), 0.6)),
        (None, NEAR, None),
        (None, FAR, (FAR, 1e-4)),  # without weights there is no error of quantization
        (Difference(np.nan, 1.0, 1.0), NEAR, (Difference(np.nan, 1.0, 1.0), 1e-4)),
    ],
)
def test_bounds(graph: Difference | None, total: Difference, wrong: tuple[Difference, float] | None) -> None:
    stage = Stage("a", graph, total, 1e-4, 0.6)
    assert stage.ok is (wrong is None)
    assert stage.violation is wrong or (stage.violation and wrong and stage.violation[1] == wrong[1])
    if wrong:
        assert stage.violation
        assert stage.violation[0] is (total if graph is None or graph is NEAR else graph)
