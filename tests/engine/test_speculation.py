"""Speculation changes how fast tokens arrive, but never which tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.conftest import PACKED, TINY
from engine.test_concurrency import WORDS, check
from engine.test_constraints import SCHEMAS, closed
from tiny import Tiny
from vlpack import Engine, Sampling
from vlpack.decoding import graphs, packing
from vlpack.engine import drafting, scheduler
from vlpack.engine.drafting import Drafter, StepCost
from vlpack.errors import OptionError
from vlpack.runtime.model import Model
from vlpack.sample_images import picture

GREEDY = Sampling(temperature=0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts tokens wherever possible, even if they are seldom accepted."""
    monkeypatch.setattr(StepCost, "price", lambda *_: 0.001)
    monkeypatch.setattr(StepCost, "longest", lambda *_: drafting.LONGEST)
    monkeypatch.setattr(drafting, "LEAST_MATCH", 1)
    monkeypatch.setitem(drafting.EXPECTED, 1, 0.5)
    monkeypatch.setattr(scheduler, "LARGEST_CHUNK", 24)
    monkeypatch.setattr(scheduler, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(scheduler, "WASTE", 3)


@PACKED
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("part", ["all", "text"])
@pytest.mark.parametrize("extra", [(), ("prune_lm_head=false",)], ids=["last logits", "all logits"])
def test_the_stock_runtimes_answers(
    part: str,
    extra: tuple[str, ...],
    alone: Callable[..., Model],
    built: Callable[..., Path],
    engine: Callable[..., Engine],
) -> None:
    made = engine(built(TINY, *extra, part=part))
    assert made.speculation
    check(alone(TINY, *extra, part=part), made, 32, images=part == "all", videos=part == "all")
    counters = made.counters
    assert counters.accepted_tokens > 5
    assert counters.drafted_tokens > 2 * counters.accepted_tokens  # most are rejected
    assert counters.steps < counters.answer_tokens


def requests(made: Engine) -> list[dict[str, Any]]:
    """Requests with all kinds of options and with texts that repeat themselves."""
    rng = random.Random(7)
    asked: list[dict[str, Any]] = []
    for number in range(24):
        words = " ".join(rng.choices(WORDS, k=6))
        images = [picture(64, 48, number)] if number % 3 == 0 else []
        asked.append({"messages": f"{words}, {words}, {words}", "images": images, "max_tokens": 1 + 3 * number})
    options: list[dict[str, Any]] = [
        {"temperature": 0.2, "seed": 1},
        {"temperature": 1.0, "top_k": 3, "seed": 2, "repetition_penalty": 1.1},
        {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "logprobs": 2},
        {"temperature": 0, "stop": ["e", "  "]},
        {"temperature": 0, "stop_token_ids": [*range(300, 500)]},
        {"temperature": 0, "max_tokens": 10**6},  # until the slot is full
        *({"temperature": 0, "schema": closed(schema)} for schema in SCHEMAS),
        {"temperature": 0.7, "seed": 3, "schema": closed(SCHEMAS[4])},
        {"temperature": 0, "regex": "(ab|cd){3}e*f?"},
        {"temperature": 0, "choices": ["a long answer", "a longer one"]},
    ]
    options += [{"temperature": 0}] * (len(asked) - len(options))
    return [request | option for request, option in zip(asked, options, strict=True)]


@PACKED
@pytest.mark.usefixtures("eager")
def test_all_that_can_be_asked_is_as_without(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    plain, made = (engine(slots=5, context=200, speculation=on) for on in (False, True))
    judged: list[int] = []
    judge = Drafter.judge

    def counted(self: Any, drafted: int, right: int, price: float) -> None:
        judged.append(right)
        judge(self, drafted, right, price)

    monkeypatch.setattr(Drafter, "judge", counted)
    asked = requests(made)
    wanted = plain.generate_many(asked)
    assert not judged
    assert plain.counters.drafted_tokens == 0
    found = made.generate_many(asked)
    for request, one, other in zip(asked, wanted, found, strict=True):
        assert other.tokens == one.tokens, request
        assert (other.text, other.finish_reason, other.parsed) == (one.text, one.finish_reason, one.parsed)
        assert len(other.tokens) <= request["max_tokens"]
        if one.logprobs is not None and other.logprobs is not None:
            np.testing.assert_allclose(
                [each.logprob for each in other.logprobs], [each.logprob for each in one.logprobs], atol=1e-4
            )
    full = found[5]
    assert full.stats.prompt_tokens + len(full.tokens) == 200
    assert made.counters.accepted_tokens == sum(judged) > 5
    assert made.counters.steps < plain.counters.steps


@PACKED
@pytest.mark.usefixtures("eager")
def test_slots_hold_what_was_accepted(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    """A conversation continues with keys and values that were written by a step with draft tokens."""
    made = engine(slots=1)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "one two " * 9}]
    for _ in range(3):
        prompt = made.prompt(messages)
        answer = made.submit(prompt, max_tokens=40, sampling=GREEDY).result(30)
        assert answer.tokens == alone().generate(prompt, max_tokens=40, sampling=GREEDY).tokens
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "one two"}]
    assert made.counters.drafted_tokens > 0


@PACKED
def test_what_a_grammar_leaves_no_choice_of(engine: Callable[..., Engine]) -> None:
    pytest.importorskip("llguidance")
    made = engine(slots=1)
    schema = {"const": {"a long name of a property": ["and", "a", "value", "that", "is", "longer", "still"]}}
    answer = made.submit("Hello", max_tokens=200, temperature=0, schema=schema).result(30)
    assert answer.parsed == schema["const"]
    assert made.counters.steps < len(answer.tokens) / 2


@PACKED
@pytest.mark.parametrize(("weights", "token"), [(72, 9), (40, 16)], ids=["int8", "int4"])
@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize("length", [32, 300])
def test_wrong_guesses_cost_little(
    weights: float,
    token: float,
    slots: int,
    length: int,
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured by a simulated clock with a 2B model's times, and compared with the steps without speculation."""
    made = engine(slots=slots)
    run, now = graphs.Graphs.run, [0.0]
    spent = {"as it is": 0.0, "without": 0.0}

    def timed(self: Any, binding: Any, tokens: Any, counts: Any, *rest: Any) -> Any:
        now[0] += 1e-3 * (weights + token * int(counts.sum()))
        if len(rest[-1]) == counts.sum():  # not a part of a prompt
            spent["as it is"] += weights + token * int(counts.sum())
            spent["without"] += weights + token * int((counts > 0).sum())
        return run(self, binding, tokens, counts, *rest)

    def wrong(self: Any, most: int) -> tuple[int, list[int]]:
        return 6, [1] * most  # a token that is never the likeliest

    prompts = [made.prompt(" ".join(WORDS[number:] * 3)) for number in range(slots)]
    monkeypatch.setattr(graphs.Graphs, "run", timed)
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Drafter, "_looked_up", wrong)
    made.generate_many(prompts, max_tokens=length, sampling=GREEDY)
    assert made.counters.accepted_tokens == 0
    assert made.counters.drafted_tokens > 0
    assert spent["as it is"] < 1.05 * spent["without"]


def test_right_guesses_become_more() -> None:
    ids = np.tile(np.arange(30, dtype=np.int32), 4)
    drafter, lengths = Drafter(ids, 200), []
    drafter.stake = drafting.FIRST_STAKE
    for _ in range(8):
        found = drafter.draft(0.15, 100)
        start = drafter._length
        assert found == [(start + place) % 30 for place in range(len(found))]
        for place in range(len(found) + 1):
            drafter.push((start + place) % 30)
        drafter.judge(len(found), len(found), 0.15)
        lengths.append(len(found))
    assert lengths[0] <= 4
    assert lengths[-1] == drafting.LONGEST
    assert drafter.draft(0.15, 3) == [(drafter._length + place) % 30 for place in range(3)]


def test_what_repeats_is_continued() -> None:
    def found(ids: list[int], most: int, price: float = 0.001, stake: float = 0.5) -> list[int]:
        drafter = Drafter(np.array(ids, np.int32), 10)
        drafter.stake = stake
        return drafter.draft(price, most)

    assert found([5, 1, 2, 3, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert found([5, 1, 2, 3], 7) == []
    assert found([4, 5], 7) == []
    assert found([4, 5, 6, 4, 5], 1) == [6]
    assert found([4, 5, 6, 4, 5], 4) == [6, 4, 5, 6]
    assert found([4, 5, 6, 4, 5], 7, stake=0) == []
    assert found([4, 5, 6, 4, 5], 7, price=1.5, stake=4) == [6]  # the stake allows one


def test_the_price_of_a_token() -> None:
    cost = StepCost()
    assert cost.price(1) == 1.0
    for tokens in [1, 1, 4, 1, 9, 2] * 6:
        cost.observe(tokens, 0.04 + 0.016 * tokens)
    assert cost.price(1) == pytest.approx(16 / 56, rel=0.01)
    assert cost.price(8) == pytest.approx(8 * 16 / 168, rel=0.01)
    assert cost.longest(1) == drafting.LONGEST
    assert cost.longest(8) == 5  # half of a step's 168 ms
    assert cost.paid(1, 4, 0.056 + 4 * 0.016) == pytest.approx(cost.price(1), rel=0.01)
    assert cost.paid(1, 4, 0.056 + 4 * 0.032) == pytest.approx(2 * cost.price(1), rel=0.01)
    assert cost.paid(1, 4, 0.01) == cost.price(1)
    assert cost.paid(1, 4, 9) == 3 * cost.price(1)


@pytest.mark.parametrize("why", ["kv_cache=int8", "onnxruntime 1.31"])
def test_where_steps_cannot_judge(
    why: str,
    alone: Callable[..., Model],
    built: Callable[..., Path],
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = built(TINY, "kv_cache=int8") if "=" in why else built(TINY)
    if "=" not in why:
        monkeypatch.setattr(packing, "ort", SimpleNamespace(__version__="1.31.2"))
    made = engine(folder)
    assert not made.speculation
    with pytest.raises(OptionError, match=r"speculation is on.*takes onnxruntime 1\.32"):
        engine(folder, speculation=True)
    if "=" in why:
        made.submit("one two " * 20, max_tokens=40, sampling=GREEDY).result(30)
    else:
        check(alone(), made, 24, images=True)
    assert made.counters.drafted_tokens == 0


def test_it_can_be_left_off(engine: Callable[..., Engine], built: Callable[..., Path]) -> None:
    tiny: Tiny = TINY
    made = engine(built(tiny), speculation=False)
    assert not made.speculation
    made.submit("one two " * 20, max_tokens=40, sampling=GREEDY).result(30)
    assert made.counters.drafted_tokens == 0
