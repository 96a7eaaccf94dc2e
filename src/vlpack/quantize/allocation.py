"""The choice of the matrices that get 8 bits instead of 4, within a given average number of bits per weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A matrix that can be stored in few bits or in many.

    Args:
        path: path of the matrix's module.
        weights: number of weights.
        few: size in bytes when stored in few bits, scales included.
        many: size in bytes when stored in many bits, scales included.
        harm: harm that few bits do to the model, in a unit that can be added up; many bits are assumed to do none.
    """

    path: str
    weights: int
    few: int
    many: int
    harm: float

    @property
    def worth(self) -> float:
        """Harm that many bits avoid, per additional byte."""
        return self.harm / (self.many - self.few)


def average_bits(candidates: Iterable[Candidate], chosen: Iterable[str] = ()) -> float:
    """Average number of bits per weight of all candidates if those whose paths are in ``chosen`` have many bits."""
    taken, size, count = set(chosen), 0, 0
    for one in candidates:
        size += one.many if one.path in taken else one.few
        count += one.weights
    return 8 * size / count


def choose(candidates: Sequence[Candidate], bits: float) -> list[str]:
    """Paths of the matrices to store in many bits, so that the average is at most ``bits`` and little harm is left.

    The choice is greedy: matrices with the most avoided harm per byte come first, and a matrix that no longer fits is
    skipped. The space that remains unused is smaller than one matrix needs.
    """
    room = bits * sum(one.weights for one in candidates) / 8 - sum(one.few for one in candidates)
    chosen = []
    for one in sorted(candidates, key=lambda one: (-one.worth, one.path)):
        if one.many - one.few <= room:
            room -= one.many - one.few
            chosen.append(one.path)
    return chosen
