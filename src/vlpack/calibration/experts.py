"""Calibration inputs of a mixture's experts: the tokens that the router sends to each, and a few tokens for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlpack.calibration.gram import Gram
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.export.graph import Weight
from vlpack.quantize.storage import slabs

Array = npt.NDArray[np.float32]

MOST = 16384
"""Largest number of tokens kept per layer; they stay in memory because its experts are calibrated one by one."""
SHARED, WORTH = 256, 64
"""Number of tokens from all parts of the texts that every expert is calibrated on, and the total weight of these
tokens, where one of the expert's own tokens counts 1. They are needed for experts to which few or no tokens were
sent."""


class ExpertInputs:
    """The inputs of one layer's experts, in the checkpoint's basis, that is, without balance and rotation.

    Args:
        checkpoint: checkpoint that contains the experts.
        gate_up: weight of the experts' gate and up projections, whose rows alternate; the inputs of the down
            projections are computed with it.
        chosen: number of experts to which each token is sent.
    """

    def __init__(self, checkpoint: Checkpoint, gate_up: Weight, chosen: int) -> None:
        self._checkpoint, self._gate_up, self._chosen = checkpoint, gate_up, chosen
        self._waiting: list[tuple[Array, Array]] = []

    def add(self, x: Array, logits: Array, factors: Array | None) -> None:
        """Adds the tokens of a text.

        Args:
            x: inputs of the experts, ``[tokens, H]``.
            logits: logits of the router, ``[tokens, E]``.
            factors: weights of the tokens, ``[tokens]``; None for 1.
        """
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        # keep the shares of the chosen experts, scaled so that equal shares are 1
        least = np.partition(shares, -self._chosen, axis=1)[:, -self._chosen, None]
        shares = np.where(shares >= least, shares, np.float32(0))
        shares *= self._chosen / shares.sum(axis=1, keepdims=True)
        self._waiting.append((x, shares if factors is None else shares * factors[:, None]))

    def finish(self) -> None:
        """Ends the collection of tokens; at most `MOST` of them, evenly spaced, are kept."""
        step = -(-sum(len(x) for x, _ in self._waiting) // MOST)
        self._x = np.concatenate([x[::step] for x, _ in self._waiting])
        self._shares = np.concatenate([shares[::step] for _, shares in self._waiting])
        self._waiting = []

    @property
    def sizes(self) -> Array:
        """Root mean squares of the experts' input channels over all kept tokens, ``[H]``."""
        mean: Array = np.sqrt(np.square(self._x).mean(axis=0, dtype=np.float64))
        return mean

    def products(self, weight: Weight, expert: int) -> Array:
        """The Hessian ``Σ xᵀx`` of the inputs of an expert's matrix, float32 ``[cols, cols]``.

        Each token is multiplied by the expert's share in its output.
        """
        own = self._shares[:, expert].nonzero()[0]
        some = np.linspace(0, len(self._x) - 1, min(SHARED, len(self._x)), dtype=np.int64)
        factors = np.full(len(some), np.sqrt(WORTH / len(some)), np.float32)
        gram = Gram(weight.cols)
        for tokens, counts in ((own, self._shares[own, expert]), (some, factors)):
            if not len(tokens):
                continue
            rows = self._x[tokens]
            gram.add(rows if weight.path == self._gate_up.path else self._inner(rows, expert), counts)
        return gram.total()

    def _inner(self, rows: Array, expert: int) -> Array:
        """Inputs of an expert's down projection, ``silu(gate x) · up x``."""
        size = self._gate_up.rows // self._gate_up.experts
        out = np.empty((len(rows), size // 2), np.float32)
        for start, stop in slabs(size // 2, 2 * rows.shape[1]):
            first = expert * size
            both = self._gate_up.source.read(self._checkpoint, first + 2 * start, first + 2 * stop)
            gate, up = np.moveaxis((rows @ both.astype(np.float32).T).reshape(len(rows), -1, 2), -1, 0)
            out[:, start:stop] = gate / (1 + np.exp(-np.clip(gate, -80, None))) * up
        return out


def expert_pairs(weights: Sequence[Weight]) -> list[tuple[Weight, Weight]]:
    """Pairs the weight of each mixture's gate and up projections with the weight of its down projections."""
    by_path = {weight.path: weight for weight in weights if weight.experts > 1}
    pairs = []
    for path, weight in by_path.items():
        parent, _, name = path.rpartition(".")
        if name == "gate_up_proj":
            pairs.append((weight, by_path[f"{parent}.down_proj"]))
    return pairs
