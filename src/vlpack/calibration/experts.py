"""What the experts of a mixture multiply: each the tokens that a router sends to it, and a few of all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlpack.calibration.gram import Gram
from vlpack.checkpoint import Checkpoint
from vlpack.graph import Weight
from vlpack.storage import slabs

Array = npt.NDArray[np.float32]

MOST = 16384
"""Tokens of a layer that are kept: its experts are fitted one after the other, and each wants its own of them."""
SHARED, WORTH = 256, 64
"""So many tokens from all over the texts go through every expert, and count together as this many of its own: an expert
that few tokens or none were sent to is fitted to them."""


class ExpertInputs:
    """The inputs of one layer's experts, in the checkpoint's basis.

    Args:
        checkpoint: of the experts.
        gate_up: the weight of their gates and ups, whose rows alternate; the downs' input is made by it.
        chosen: how many experts each token is sent to.
    """

    def __init__(self, checkpoint: Checkpoint, gate_up: Weight, chosen: int) -> None:
        self._checkpoint, self._gate_up, self._chosen = checkpoint, gate_up, chosen
        self._waiting: list[tuple[Array, Array]] = []

    def add(self, x: Array, logits: Array, factors: Array | None) -> None:
        """More tokens.

        Args:
            x: ``[tokens, H]``.
            logits: of the router, ``[tokens, E]``.
            factors: what each token is multiplied by, ``[tokens]``; None for nothing.
        """
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        # those of the chosen experts; equal shares count as 1
        least = np.partition(shares, -self._chosen, axis=1)[:, -self._chosen, None]
        shares = np.where(shares >= least, shares, np.float32(0))
        shares *= self._chosen / shares.sum(axis=1, keepdims=True)
        self._waiting.append((x, shares if factors is None else shares * factors[:, None]))

    def finish(self) -> None:
        """All tokens are there."""
        step = -(-sum(len(x) for x, _ in self._waiting) // MOST)
        self._x = np.concatenate([x[::step] for x, _ in self._waiting])
        self._shares = np.concatenate([shares[::step] for _, shares in self._waiting])
        self._waiting = []

    @property
    def sizes(self) -> Array:
        """Root mean squares of the channels ``[H]`` of all tokens."""
        mean: Array = np.sqrt(np.square(self._x).mean(axis=0, dtype=np.float64))
        return mean

    def products(self, weight: Weight, expert: int) -> Array:
        """``Σ xᵀx`` of what an expert's matrix multiplies, a token's output counting as much as it does in the sum."""
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
        """What an expert's down projection multiplies: ``silu(gate x) · up x``."""
        size = self._gate_up.rows // self._gate_up.experts
        out = np.empty((len(rows), size // 2), np.float32)
        for start, stop in slabs(size // 2, 2 * rows.shape[1]):
            first = expert * size
            both = self._gate_up.source.read(self._checkpoint, first + 2 * start, first + 2 * stop)
            gate, up = np.moveaxis((rows @ both.astype(np.float32).T).reshape(len(rows), -1, 2), -1, 0)
            out[:, start:stop] = gate / (1 + np.exp(-np.clip(gate, -80, None))) * up
        return out


def expert_pairs(weights: Sequence[Weight]) -> list[tuple[Weight, Weight]]:
    """The weights of gates and ups, each with that of the downs of the same experts."""
    by_path = {weight.path: weight for weight in weights if weight.experts > 1}
    pairs = []
    for path, weight in by_path.items():
        parent, _, name = path.rpartition(".")
        if name == "gate_up_proj":
            pairs.append((weight, by_path[f"{parent}.down_proj"]))
    return pairs
