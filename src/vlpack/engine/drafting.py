"""Speculation: guesses of an answer's next tokens, which one step of the decoder confirms or refutes together.

Guesses are what followed the last tokens where they occurred before, in prompt or answer (prompt lookup decoding,
Saxena 2023), and what a grammar leaves no choice of. Every token of the answer is still chosen from its own logits, so
that guesses change when tokens come, and not which. How many are worth their time depends on how often this answer's
guesses were right, and on what a token more costs in a step, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST = 16
"""Tokens that are guessed at a time at most."""

LEAST_MATCH, LONGEST_MATCH = 2, 6
"""How many last tokens must have occurred before, and from which number on more of them make no difference."""

EXPECTED = {0: 0.9, 2: 0.25, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75}
"""How often guesses are right before this answer's are known, by the number of tokens that occurred before; 0 are those
of a grammar."""

FIRST_STAKE, SHARE, MOST = 0.5, 0.02, 4.0
"""What an answer may lose by wrong guesses, in tokens: at first, as far as others have left it, more with every token,
and at most at a time."""

LEFT = 0.01
"""What each token leaves for the first stakes of answers to come."""

TOGETHER = 0.5
"""By what part of itself one answer's guesses may prolong a step that others wait for."""


class StepCost:
    """What a token more costs in a step: seconds by number of tokens, a line through the latest steps."""

    decay = 0.95

    def __init__(self) -> None:
        self._left = FIRST_STAKE
        self._weight = 0.0
        self._tokens = self._seconds = self._variance = self._covariance = 0.0
        self._slope = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from one step."""
        self._left = min(self._left + LEFT * tokens, MOST)
        if self._weight:
            seconds = min(seconds, 3 * self.seconds(tokens))  # other programs had the cores
        self._weight = self.decay * self._weight + 1
        share = 1 / self._weight
        before = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * before[0]
        self._seconds += share * before[1]
        keep = 1 - share
        self._variance = keep * (self._variance + share * before[0] ** 2)
        self._covariance = keep * (self._covariance + share * before[0] * before[1])
        if self._variance > 0.05:
            # a step is at least as long as its tokens, and the first one costs most
            self._slope = min(max(self._covariance / self._variance, 0.0), self._seconds / max(self._tokens, 1.0))

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes."""
        return max(self._seconds + self.slope * (tokens - self._tokens), 0.1 * self._seconds)

    @property
    def slope(self) -> float:
        """Seconds of a token more; until steps of different sizes were seen, as if weights took as long as 4."""
        return self._slope or self._seconds / (self._tokens + 4)

    def price(self, tokens: int) -> float:
        """What a token more costs in a step that makes so many tokens, in tokens that could be made meanwhile."""
        whole = self.seconds(tokens)
        return tokens * self.slope / whole if whole else 1.0

    def paid(self, tokens: int, guesses: int, seconds: float) -> float:
        """What each guess did cost in a step that judged some: at least its price, and more where the step took longer.

        Args:
            tokens: that the step would have made without guesses.
            guesses: how many there were.
            seconds: that it took.
        """
        price, whole = self.price(tokens), self.seconds(tokens)
        taken = tokens * (seconds - whole) / (whole * guesses) if whole else price
        return min(max(price, taken), 3 * price)  # other programs may have had the cores

    def stake(self) -> float:
        """What the next answer may lose at first, in tokens."""
        stake = min(self._left, FIRST_STAKE)
        self._left -= stake
        return stake

    def longest(self, tokens: int) -> int:
        """How many guesses of one answer a step of so many tokens has room for."""
        if tokens == 1 or not self.slope:
            return LONGEST
        return max(1, int(TOGETHER * self.seconds(tokens) / self.slope))


class Drafter:
    """Guesses the tokens of one answer.

    Args:
        prompt: its tokens.
        room: of the answer at most.

    Attributes:
        stake: what it may lose by wrong guesses, in tokens.
    """

    def __init__(self, prompt: npt.NDArray[np.int32], room: int) -> None:
        self._ids = np.zeros(len(prompt) + room, np.int32)
        self._ids[: len(prompt)] = prompt
        self._length = len(prompt)
        self.stake = 0.0
        self._right: dict[int, float] = {}
        self._tried: dict[int, float] = {}
        self._kind = 0

    def push(self, token: int) -> None:
        """Note the answer's next token."""
        self._ids[self._length] = token
        self._length += 1
        self.stake = min(self.stake + SHARE, MOST)

    def draft(self, price: float, most: int, forced: Sequence[int] = ()) -> list[int]:
        """Guesses of the next tokens, as many as are worth their price.

        Args:
            price: of each, in tokens.
            most: how many at most.
            forced: what a grammar leaves no choice of.
        """
        if most < 1 or self.stake < price:
            return []
        self._kind, found = (0, list(forced)) if forced else self._looked_up(min(most, LONGEST))
        if not found:
            return []
        chance = self._chance(self._kind)
        # the k-th is right if all before it are; one more is worth it as long as that is likelier than its price
        worth = LONGEST if price <= 0 else int(math.log(price) / math.log(chance)) if price < 1 else 0
        # one guess that is not worth it tells whether that is still so; what wrong ones may cost bounds how often
        return found[: min(most, LONGEST, max(worth, 1), int(self.stake / price) if price > 0 else LONGEST)]

    def judge(self, drafted: int, right: int, price: float) -> None:
        """Learn how many of the last guesses were right.

        Args:
            drafted: how many there were.
            right: how many of them, from the first on.
            price: of each, in tokens.
        """
        kind = self._kind
        self.stake = min(self.stake - drafted * price + right, MOST)
        self._right[kind] = 0.9 * self._right.get(kind, 0.0) + right
        self._tried[kind] = 0.9 * self._tried.get(kind, 0.0) + min(right + 1, drafted)

    def _chance(self, kind: int) -> float:
        """How likely a guess is right where the ones before it are."""
        return min((self._right.get(kind, 0.0) + 2 * EXPECTED[kind]) / (self._tried.get(kind, 0.0) + 2), 0.99)

    def _looked_up(self, most: int) -> tuple[int, list[int]]:
        """What followed the longest, and of these the latest, earlier occurrence of the last tokens."""
        ids = self._ids[: self._length]
        places = np.flatnonzero(ids[:-1] == ids[-1])
        match = 1
        while match < LONGEST_MATCH and len(places):
            longer = places[places >= match]
            longer = longer[ids[longer - match] == ids[-1 - match]] if match < len(ids) else longer[:0]
            if not len(longer):
                break
            places, match = longer, match + 1
        if match < LEAST_MATCH or not len(places):
            return match, []
        followed = ids[places[-1] + 1 :]
        # what reaches the answer's end repeats itself
        return match, np.resize(followed, most).tolist() if len(followed) < most else followed[:most].tolist()
