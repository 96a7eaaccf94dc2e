"""Which matrices of a model have 8 bits, where an average of bits per weight is given and most have 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A matrix that may have few bits or many.

    Args:
        path: of its module.
        weights: how many it has.
        few: bytes in few bits, scales included.
        many: bytes in many bits, likewise.
        harm: of few bits, in a unit that can be added up; that of many bits is next to nothing.
    """

    path: str
    weights: int
    few: int
    many: int
    harm: float

    @property
    def worth(self) -> float:
        """Harm that is undone for each byte more."""
        return self.harm / (self.many - self.few)


def average_bits(candidates: Iterable[Candidate], chosen: Iterable[str] = ()) -> float:
    """Bits per weight of all candidates, where those that are ``chosen`` have many."""
    taken, size, count = set(chosen), 0, 0
    for one in candidates:
        size += one.many if one.path in taken else one.few
        count += one.weights
    return 8 * size / count


def choose(candidates: Sequence[Candidate], bits: float) -> list[str]:
    """Paths of those that have many bits, so that the average is at most ``bits`` and little harm is left.

    The most worthy come first, and one for which there is no room is passed over: what is left to gain then is less
    than a matrix.
    """
    room = bits * sum(one.weights for one in candidates) / 8 - sum(one.few for one in candidates)
    chosen = []
    for one in sorted(candidates, key=lambda one: (-one.worth, one.path)):
        if one.many - one.few <= room:
            room -= one.many - one.few
            chosen.append(one.path)
    return chosen
