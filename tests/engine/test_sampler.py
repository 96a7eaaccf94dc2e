"""Sampling: tokens have the requested distribution, a seed determines the answer, and answers end where they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.conftest import TINY
from vlpack import Engine, Sampling
from vlpack.errors import OptionError
from vlpack.runtime.model import Model
from vlpack.runtime.sampler import Choice, Sampler, choice_of, likeliest, logprob_of

GREEDY = Sampling(temperature=0)
LOGITS = np.log(np.array([0.05, 0.4, 0.2, 0.25, 0.1], np.float32))
NONE = np.zeros(0, np.int32)


def shares(choice: Choice, allowed: Any = None, count: int = 4000) -> np.ndarray:
    """The share of each token among the first tokens of ``count`` answers."""
    drawn = [Sampler(choice, NONE, 5, {0}, index)(LOGITS.copy(), allowed) for index in range(count)]
    return np.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.05, 0.4, 0.2, 0.25, 0.1]),
        ({"temperature": 0.5}, np.array([0.05, 0.4, 0.2, 0.25, 0.1]) ** 2 / 0.275),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 99}, [0.05, 0.4, 0.2, 0.25, 0.1]),
        ({"top_p": 0.66}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        ({"top_p": 0.64}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 3, "top_p": 0.47}, [0, 0.4 / 0.4, 0, 0, 0]),  # the likeliest has 0.4 / 0.85 after top_k
        ({"min_p": 0.3}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        ({"min_p": 0.6, "top_k": 3}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
    ids=str,
)
def test_the_distribution(options: dict[str, Any], wanted: Any) -> None:
    found = shares(Choice(**{"temperature": 1.0, "seed": 1, **options}))
    assert np.abs(found - wanted).max() < 0.03
    assert not found[np.asarray(wanted) == 0].any()


def test_tokens_that_are_not_allowed_are_never_drawn() -> None:
    allowed = np.array([True, False, True, False, False])
    found = shares(Choice(temperature=1.0, seed=1), allowed)
    assert np.abs(found - [0.2, 0, 0.8, 0, 0]).max() < 0.03
    assert Sampler(Choice(), NONE, 5, set())(LOGITS.copy(), allowed) == 2


def test_top_p_with_a_large_vocabulary() -> None:
    """All tokens are sorted if the likeliest few, which are sorted first, do not reach top_p together."""
    logits = np.zeros(5000, np.float32)
    drawn = {Sampler(Choice(1.0, top_p=0.5, seed=7), NONE, 5000, set(), i)(logits.copy()) for i in range(300)}
    assert max(drawn) < 2500
    assert max(drawn) > 2000
    assert likeliest(np.array([1, 3, 2, 3, 0]), 3).tolist() == [1, 3, 2]


def test_penalties() -> None:
    sampler = Sampler(Choice(presence_penalty=0.3, frequency_penalty=0.2), NONE, 3, set())
    logits = np.array([1.0, 0.8, 0.0], np.float32)
    # the first token's logit falls from 1.0 to 0.5 and 0.3 when the answer contains it once and twice
    assert [sampler(logits.copy()) for _ in range(5)] == [0, 1, 0, 1, 0]
    sampler = Sampler(Choice(repetition_penalty=2.0), np.array([0], np.int32), 3, set())
    logits = np.array([1.0, 0.6, -0.1], np.float32)
    assert [sampler(logits.copy()) for _ in range(2)] == [1, 0]
    sampler = Sampler(Choice(repetition_penalty=4.0), np.array([1], np.int32), 2, set())
    assert sampler(np.array([-0.3, -0.1], np.float32)) == 0  # negative logits are multiplied by the penalty


def test_no_end_token_before_min_length() -> None:
    sampler = Sampler(Choice(min_length=4), np.array([1, 1], np.int32), 3, {0})
    assert [sampler(np.array([2.0, 1.0, 0.0], np.float32)) for _ in range(3)] == [1, 1, 0]
    only = np.array([True, False, False])  # a complete grammar allows only the end token
    assert Sampler(Choice(min_length=4), NONE, 3, {0})(np.array([2.0, 1.0, 0.0], np.float32), only) == 0


def test_options_override_the_packages_settings() -> None:
    search = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    assert choice_of(search, None) == Choice(0.7, 20, 0.8, repetition_penalty=1.05)
    assert choice_of(search, GREEDY) == Choice(repetition_penalty=1.05)
    assert choice_of({}, None) == Choice()
    assert choice_of({}, Sampling(top_p=0.5, seed=4), min_p=0.1) == Choice(1.0, 0, 0.5, 0.1, seed=4)
    assert choice_of({}, None, min_p=0.1).temperature == 1
    for bad in ({"min_p": 2}, {"presence_penalty": 3}, {"frequency_penalty": "1"}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            choice_of({}, None, **bad)
    with pytest.raises(OptionError, match="min_p has no effect"):
        choice_of({}, GREEDY, min_p=0.1)


def test_logprobs(engine: Callable[..., Engine]) -> None:
    alone = logprob_of(LOGITS + 3, 2, 2)
    assert alone.token == 2
    assert alone.logprob == pytest.approx(np.log(0.2))
    assert [place for place, _ in alone.top] == [1, 3]
    made = engine()
    plain = made.submit("Hello", max_tokens=8, sampling=GREEDY).result(30)
    assert plain.logprobs is None
    # log-probabilities are those of the model: a penalty changes the chosen token, but not its reported probability
    answer = made.submit("Hello", max_tokens=8, repetition_penalty=9.0, logprobs=2).result(30)
    assert answer.logprobs is not None
    assert [each.token for each in answer.logprobs] == answer.tokens
    found = made.submit("Hello", max_tokens=1, sampling=GREEDY, logprobs=2).result(30).logprobs
    assert found is not None
    assert found[0].token == plain.tokens[0]
    for (token, logprob), (same, other) in zip(answer.logprobs[0].top, found[0].top, strict=True):
        assert (token, round(logprob, 3)) == (same, round(other, 3))
    for each in answer.logprobs:
        assert len(each.top) == 2
        assert each.top[0][1] >= each.logprob
        assert each.top[0][1] > each.top[1][1]


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}], ids=str)
def test_a_seed_gives_the_same_answer_whatever_else_runs(options: Any, engine: Callable[..., Engine]) -> None:
    made = engine(slots=5)
    wanted = made.submit("What is it?", max_tokens=30, seed=5, **options).result(30)
    others = [made.submit(f"Number {number}", max_tokens=40, temperature=2.0) for number in range(7)]
    found = made.submit_n(3, "What is it?", max_tokens=30, seed=5, **options)
    answers = [handle.result(30).tokens for handle in found]
    assert answers[0] == wanted.tokens
    assert len({tuple(answer) for answer in answers}) == 3
    assert made.submit("What is it?", max_tokens=30, seed=6, **options).result(30).tokens != wanted.tokens
    free = [made.submit("What is it?", max_tokens=30, **options).result(30).tokens for _ in range(2)]
    assert free[0] != free[1]
    for other in others:
        assert len(other.result(30).tokens) == 40


def test_penalties_as_in_the_stock_runtime(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine()
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "repetition_penalty": 1.3}
    plain = made.submit("Hello", max_tokens=30, temperature=0).result(30).tokens
    found = made.submit("Hello", **options).result(30).tokens
    assert found == alone().generate("Hello", **options).tokens != plain


def test_stop_tokens_and_stop_texts(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine()
    whole = made.submit("Hello", max_tokens=20, sampling=GREEDY).result(30)
    token = whole.tokens[7]
    cut = made.submit("Hello", max_tokens=20, sampling=GREEDY, stop_token_ids=[token]).result(30)
    assert (cut.tokens, cut.finish_reason) == (whole.tokens[: whole.tokens.index(token) + 1], "stop")
    stop = whole.text[len(whole.text) // 2 :][:3]
    found = made.submit("Hello", max_tokens=20, sampling=GREEDY, stop=[stop]).result(30)
    wanted = alone().generate("Hello", max_tokens=20, sampling=GREEDY, stop=[stop])
    assert (found.text, found.tokens, found.finish_reason) == (wanted.text, wanted.tokens, "stop")
    assert found.text == whole.text[: whole.text.index(stop)]
    with pytest.raises(OptionError, match="stop_token_ids"):
        made.submit("Hello", stop_token_ids=[TINY.vocabulary])
    with pytest.raises(OptionError, match="sampling and seed are both given"):
        made.submit("Hello", sampling=GREEDY, seed=1)
