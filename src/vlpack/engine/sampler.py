"""How the next token of an answer is chosen from its logits: penalties, limits, and a generator of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.errors import OptionError
from vlpack.runtime.sampling import Sampling, check_number

FEW = 512
"""The likeliest tokens that are sorted first; all of them only where these do not reach top_p."""


class TokenLogprob(NamedTuple):
    """A token of an answer and its logarithmic probability, by the model itself: before penalties and limits.

    Attributes:
        token: its id.
        logprob: natural logarithm.
        top: the likeliest tokens in its place, as (id, logarithm), as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen, every value known.

    Args:
        temperature: 0 takes the likeliest token always.
        top_k: only the k likeliest; 0 is all.
        top_p: only the likeliest whose probabilities sum to p.
        min_p: only those at least so likely as this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from the logits of tokens that the answer has, once for each time it has them.
        seed: the same seed gives the same answer, whatever else is answered meanwhile; None is another one each time.
        min_length: tokens of prompt and answer before which it does not end.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_length: int = 0


def choice_of(
    search: Mapping[str, Any],
    sampling: Sampling | None,
    *,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
) -> Choice:
    """What is asked for, and the package's settings for the rest.

    Args:
        search: the section of the package's genai_config.json.
        sampling: what the stock runtime knows too.
        min_p: see `Choice`, as the next two.
        presence_penalty: from -2 to 2.
        frequency_penalty: from -2 to 2.

    Raises:
        OptionError: a value is out of its range, or would have no effect.
    """
    check_number("min_p", min_p, 0, 1)
    check_number("presence_penalty", presence_penalty, -2, 2)
    check_number("frequency_penalty", frequency_penalty, -2, 2)
    asked = (sampling or Sampling()).search_options()
    if min_p is not None and "do_sample" not in asked:
        asked["do_sample"] = True
    elif min_p is not None and not asked["do_sample"]:
        raise OptionError("With temperature 0 the likeliest token is taken, so min_p has no effect.")
    said = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_length": 0, **search, **asked}
    sample = bool(said.get("do_sample", False))
    return Choice(
        temperature=float(said["temperature"]) if sample else 0.0,
        top_k=int(said["top_k"]) if sample else 0,
        top_p=float(said["top_p"]) if sample else 1.0,
        min_p=min_p or 0.0,
        repetition_penalty=float(said["repetition_penalty"]),
        presence_penalty=presence_penalty or 0.0,
        frequency_penalty=frequency_penalty or 0.0,
        seed=asked.get("random_seed"),
        min_length=int(said["min_length"]),
    )


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        choice: how.
        prompt: its tokens.
        vocab_size: how many tokens there are.
        ends: tokens that end an answer.
        index: of the answer, where several are made with one seed.
    """

    def __init__(
        self, choice: Choice, prompt: npt.NDArray[np.int32], vocab_size: int, ends: set[int], index: int = 0
    ) -> None:
        self._choice, self._ends = choice, sorted(end for end in ends if end < vocab_size)
        seeds = None if choice.seed is None else np.random.SeedSequence([choice.seed, index])
        self._random = np.random.Generator(np.random.PCG64(seeds))
        self._length = len(prompt)
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self._seen = np.zeros(vocab_size, np.bool_)  # in prompt and answer
        self._seen[prompt[prompt < vocab_size]] = True

    def __call__(self, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token.

        Args:
            logits: ``[V]``; they may be changed.
            allowed: ``[V]``, which tokens a constraint takes; None takes all.
        """
        choice = self._choice
        if allowed is not None:
            logits[~allowed] = -np.inf
        self._penalize(logits)
        if self._length < choice.min_length and np.isfinite(np.delete(logits, self._ends)).any():
            logits[self._ends] = -np.inf
        token = int(logits.argmax()) if choice.temperature == 0 else self._draw(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._seen[token] = True
        self._length += 1
        return token

    def _penalize(self, logits: npt.NDArray[np.float32]) -> None:
        choice = self._choice
        if choice.repetition_penalty != 1:
            seen = np.flatnonzero(self._seen)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / choice.repetition_penalty, values * choice.repetition_penalty)
        if choice.presence_penalty or choice.frequency_penalty:
            said = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[said] -= choice.presence_penalty + choice.frequency_penalty * counts

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        """A token by its probability among those that temperature, top_k, top_p and min_p leave."""
        choice = self._choice
        tokens = likeliest(logits, choice.top_k) if choice.top_k else np.arange(len(logits))
        scaled = logits[tokens] / np.float32(choice.temperature)
        weights = np.exp(scaled - scaled.max())
        if choice.top_p < 1:  # of what top_k has left, as in transformers
            wanted = choice.top_p * float(weights.sum(dtype=np.float64))
            order = likeliest(weights, FEW)
            if weights[order].sum(dtype=np.float64) < wanted:
                order = likeliest(weights, len(weights))
            before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
            order = order[before < wanted]
            tokens, weights = tokens[order], weights[order]
        if choice.min_p:
            kept = weights >= choice.min_p  # the likeliest weighs 1
            tokens, weights = tokens[kept], weights[kept]
        sums = np.cumsum(weights, dtype=np.float64)
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(place, int(np.flatnonzero(weights)[-1]))])


def likeliest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """The places of the ``count`` largest values, the largest first, of equal ones the first."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]


def logprob_of(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """A token's logarithmic probability, and the ``top`` likeliest tokens in its place."""
    shifted = logits.astype(np.float64) - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    best = likeliest(logs, top) if top else ()
    return TokenLogprob(token, float(logs[token]), tuple((int(place), float(logs[place])) for place in best))
