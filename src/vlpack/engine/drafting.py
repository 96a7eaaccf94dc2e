"""Speculation: drafts an answer's next tokens, so that one step of the decoder checks several of them at once.

Draft tokens are those that followed an earlier occurrence of the last tokens in the prompt or answer (prompt lookup
decoding, Saxena 2023), or those that a grammar forces. Every token of the answer is still chosen from its own logits,
so drafts change how fast tokens arrive, but not which ones. The number of draft tokens depends on how often drafts of
this answer were accepted and on the cost of an additional token in a step, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST = 16
"""Largest number of draft tokens of an answer in one step."""

LEAST_MATCH, LONGEST_MATCH = 2, 6
"""Smallest number of last tokens that must have occurred before, and the number from which on more are not compared."""

EXPECTED = {0: 0.9, 2: 0.25, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75}
"""Assumed acceptance rate of draft tokens before any of the answer were checked, by the number of last tokens that
occurred before; 0 stands for tokens that a grammar forces."""

FIRST_STAKE, SHARE, MOST = 0.5, 0.02, 4.0
"""Stake of an answer, that is the cost of rejected draft tokens that it may still cause, measured in tokens: largest
stake at its beginning, increase with every token, and largest stake at any time."""

LEFT = 0.01
"""Amount, in tokens, that each token of any answer adds to the fund from which new answers get their first stakes."""

TOGETHER = 0.5
"""Largest share by which the draft tokens of one answer may prolong a step of several answers."""


class StepCost:
    """The measured time of a step by its number of tokens: a regression line through the latest steps."""

    decay = 0.95

    def __init__(self) -> None:
        self._left = FIRST_STAKE
        self._weight = 0.0
        self._tokens = self._seconds = self._variance = self._covariance = 0.0
        self._slope = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Updates the line with the time of one step."""
        self._left = min(self._left + LEFT * tokens, MOST)
        if self._weight:
            seconds = min(seconds, 3 * self.seconds(tokens))  # outliers: other programs used the cores
        self._weight = self.decay * self._weight + 1
        share = 1 / self._weight
        before = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * before[0]
        self._seconds += share * before[1]
        keep = 1 - share
        self._variance = keep * (self._variance + share * before[0] ** 2)
        self._covariance = keep * (self._covariance + share * before[0] * before[1])
        if self._variance > 0.05:
            # the line crosses zero tokens at 0 seconds or above, because the first token costs most
            self._slope = min(max(self._covariance / self._variance, 0.0), self._seconds / max(self._tokens, 1.0))

    def seconds(self, tokens: int) -> float:
        """The expected seconds of a step with this number of tokens."""
        return max(self._seconds + self.slope * (tokens - self._tokens), 0.1 * self._seconds)

    @property
    def slope(self) -> float:
        """Seconds per additional token; assumes that reading weights takes as long as 4 tokens until sizes differ."""
        return self._slope or self._seconds / (self._tokens + 4)

    def price(self, tokens: int) -> float:
        """The cost of an additional token in a step of ``tokens`` tokens, as tokens that could be made in that time."""
        whole = self.seconds(tokens)
        return tokens * self.slope / whole if whole else 1.0

    def paid(self, tokens: int, guesses: int, seconds: float) -> float:
        """The cost in tokens of each draft token in a finished step: its price, or more if the step took longer.

        Args:
            tokens: number of tokens of the step without draft tokens.
            guesses: number of draft tokens.
            seconds: time of the step in seconds.
        """
        price, whole = self.price(tokens), self.seconds(tokens)
        taken = tokens * (seconds - whole) / (whole * guesses) if whole else price
        return min(max(price, taken), 3 * price)  # bounded, because other programs may have used the cores

    def stake(self) -> float:
        """Takes the first stake of a new answer out of the fund and returns it, in tokens."""
        stake = min(self._left, FIRST_STAKE)
        self._left -= stake
        return stake

    def longest(self, tokens: int) -> int:
        """The largest number of draft tokens of one answer in a step that has ``tokens`` tokens without them."""
        if tokens == 1 or not self.slope:
            return LONGEST
        return max(1, int(TOGETHER * self.seconds(tokens) / self.slope))


class Drafter:
    """Drafts the next tokens of one answer.

    Args:
        prompt: tokens of the prompt, int32 ``[S]``.
        room: largest number of tokens of the answer.

    Attributes:
        stake: cost of rejected draft tokens that the answer may still cause, in tokens.
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
        """Records the answer's next token."""
        self._ids[self._length] = token
        self._length += 1
        self.stake = min(self.stake + SHARE, MOST)

    def draft(self, price: float, most: int, forced: Sequence[int] = ()) -> list[int]:
        """Drafts the next tokens, as many as are likely to save more time than they cost.

        Args:
            price: cost of each draft token, in tokens.
            most: largest number of draft tokens.
            forced: next tokens that a grammar forces; if there are any, only they are drafted.
        """
        if most < 1 or self.stake < price:
            return []
        self._kind, found = (0, list(forced)) if forced else self._looked_up(min(most, LONGEST))
        if not found:
            return []
        chance = self._chance(self._kind)
        # the k-th token is accepted with probability chance ** k; it pays as long as this exceeds its price
        worth = LONGEST if price <= 0 else int(math.log(price) / math.log(chance)) if price < 1 else 0
        # one token is drafted even if it does not pay, to notice changes; the stake bounds how often
        return found[: min(most, LONGEST, max(worth, 1), int(self.stake / price) if price > 0 else LONGEST)]

    def judge(self, drafted: int, right: int, price: float) -> None:
        """Updates the stake and the acceptance rate after a step has checked the last draft.

        Args:
            drafted: number of draft tokens.
            right: number of accepted ones, from the first on.
            price: cost of each draft token, in tokens.
        """
        kind = self._kind
        self.stake = min(self.stake - drafted * price + right, MOST)
        self._right[kind] = 0.9 * self._right.get(kind, 0.0) + right
        self._tried[kind] = 0.9 * self._tried.get(kind, 0.0) + min(right + 1, drafted)

    def _chance(self, kind: int) -> float:
        """The estimated probability that a draft token of this kind is accepted if those before it were."""
        return min((self._right.get(kind, 0.0) + 2 * EXPECTED[kind]) / (self._tried.get(kind, 0.0) + 2), 0.99)

    def _looked_up(self, most: int) -> tuple[int, list[int]]:
        """The length of the longest earlier match of the last tokens, and the tokens after its latest occurrence."""
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
        # a match that reaches the end of the answer is repeated, because the answer repeats itself
        return match, np.resize(followed, most).tolist() if len(followed) < most else followed[:most].tolist()
