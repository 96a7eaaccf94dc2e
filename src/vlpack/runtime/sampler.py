"""Sampling: chooses the next token of an answer from its logits, with penalties, truncation and a seed per answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.errors import OptionError
from vlpack.runtime.sampling import Sampling, check_number

FEW = 512
"""Number of the likeliest tokens that are sorted for top_p; all tokens are sorted only if these do not reach top_p."""


class TokenLogprob(NamedTuple):
    """A token of an answer and its log-probability according to the model, before penalties and truncation.

    Attributes:
        token: token id.
        logprob: natural logarithm of the token's probability.
        top: the likeliest tokens at this place as (id, log-probability), as many as were requested.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """Sampling parameters of an answer, with the package's defaults filled in.

    Args:
        temperature: divisor of the logits; 0 always chooses the likeliest token.
        top_k: number of the likeliest tokens to choose from; 0 for all.
        top_p: probability that the likeliest tokens to choose from have together.
        min_p: smallest probability of a token to choose from, as a share of the likeliest token's.
        repetition_penalty: factor that makes tokens of the prompt and the answer less likely if it is above 1.
        presence_penalty: amount subtracted from the logits of tokens that the answer contains.
        frequency_penalty: amount subtracted from the logit of a token for each time that the answer contains it.
        seed: seed of the random choice, which makes the answer independent of other requests; None for a random seed.
        min_length: number of tokens of prompt and answer together before which the answer does not end.
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
    """Combines the sampling parameters that a caller gives with the package's defaults.

    Args:
        search: ``search`` section of the package's genai_config.json.
        sampling: parameters that the stock runtime has, too; None for the package's.
        min_p: share of the likeliest token's probability, from 0 to 1, as in `Choice`; None for 0.
        presence_penalty: penalty from -2 to 2, as in `Choice`; None for 0.
        frequency_penalty: penalty from -2 to 2, as in `Choice`; None for 0.

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
        choice: sampling parameters.
        prompt: tokens of the prompt, int32 ``[S]``.
        vocab_size: number of logits.
        ends: tokens that end an answer.
        index: index of the answer among several with the same seed, so that they differ.
    """

    def __init__(
        self, choice: Choice, prompt: npt.NDArray[np.int32], vocab_size: int, ends: set[int], index: int = 0
    ) -> None:
        self._choice, self._ends = choice, sorted(end for end in ends if end < vocab_size)
        seeds = None if choice.seed is None else np.random.SeedSequence([choice.seed, index])
        self._random = np.random.Generator(np.random.PCG64(seeds))
        self._length = len(prompt)
        self._counts: dict[int, int] = {}  # token → how often the answer contains it
        self._seen = np.zeros(vocab_size, np.bool_)  # whether the prompt or the answer contains each token
        self._seen[prompt[prompt < vocab_size]] = True

    def __call__(self, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Chooses the next token.

        Args:
            logits: logits ``[V]``, which may be changed in place.
            allowed: mask ``[V]`` of the tokens that a constraint allows; None allows all.
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
        """Draws a token at random after temperature, top_k, top_p and min_p were applied."""
        choice = self._choice
        tokens = likeliest(logits, choice.top_k) if choice.top_k else np.arange(len(logits))
        scaled = logits[tokens] / np.float32(choice.temperature)
        weights = np.exp(scaled - scaled.max())
        if choice.top_p < 1:  # a share of the probability that is left after top_k, as in transformers
            wanted = choice.top_p * float(weights.sum(dtype=np.float64))
            order = likeliest(weights, FEW)
            if weights[order].sum(dtype=np.float64) < wanted:
                order = likeliest(weights, len(weights))
            before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
            order = order[before < wanted]
            tokens, weights = tokens[order], weights[order]
        if choice.min_p:
            kept = weights >= choice.min_p  # the likeliest token's weight is 1
            tokens, weights = tokens[kept], weights[kept]
        sums = np.cumsum(weights, dtype=np.float64)
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(place, int(np.flatnonzero(weights)[-1]))])


def likeliest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """The indices of the ``count`` largest values, the largest first, the lower index first among equals."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]


def logprob_of(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The log-probability of a token, and those of the ``top`` likeliest tokens at the same place."""
    shifted = logits.astype(np.float64) - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    best = likeliest(logs, top) if top else ()
    return TokenLogprob(token, float(logs[token]), tuple((int(place), float(logs[place])) for place in best))
