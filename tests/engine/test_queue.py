"""The queue: clients take turns, and the number of waiting requests is limited."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vlpack import Engine, Sampling
from vlpack.engine import QueueFullError
from vlpack.engine.queue import FairQueue

GREEDY = Sampling(temperature=0)


def request(name: str, client: object = None) -> Any:
    return SimpleNamespace(name=name, client=client)


def test_occupancy_and_probabilities_on_the_way(engine: Callable[..., Engine]) -> None:
    made = engine(slots=2)
    handles = made.submit_n(3, "Hello", max_tokens=450, temperature=0, logprobs=0)
    while not all(handle.logprobs for handle in handles[:2]):
        time.sleep(0.005)
    assert tuple(made.occupancy) == (2, 2, 1)
    answers = [handle.result(60) for handle in handles]
    assert tuple(made.occupancy) == (2, 0, 0)
    for handle, answer in zip(handles, answers, strict=True):
        assert [one.token for one in handle.logprobs] == answer.tokens


def test_clients_take_turns() -> None:
    queue = FairQueue(9)
    asked = [request(f"a{n}", "a") for n in range(3)] + [request("b0", "b"), request("c0"), request("b1", "b")]
    for each in asked:
        queue.put([each])
    assert queue.remove(asked[1])
    assert not queue.remove(asked[1])
    popped: list[Any] = [queue.pop() for _ in range(len(queue))]
    assert [each.name for each in popped] == ["a0", "b0", "c0", "a2", "b1"]
    assert len(queue) == 0


def test_more_requests_than_the_limit_are_refused() -> None:
    queue = FairQueue(2)
    queue.put([request("first")])
    with pytest.raises(QueueFullError, match="1 requests wait for a slot, and no more than 2 may"):
        queue.put([request("second"), request("third")])
    assert len(queue) == 1


def test_an_engine_with_a_full_queue(engine: Callable[..., Engine]) -> None:
    made = engine(slots=1, queue=1)
    first = made.submit("Hello", max_tokens=400, sampling=GREEDY)
    next(iter(first))
    second = made.submit("What?", max_tokens=2, sampling=GREEDY)
    with pytest.raises(QueueFullError, match="queue"):
        made.submit("What?", max_tokens=2, sampling=GREEDY)
    first.cancel()
    third = made.submit("What?", max_tokens=2, sampling=GREEDY, wait=True)
    assert second.result(30).tokens == third.result(30).tokens


def test_a_client_with_many_requests_does_not_block_others(engine: Callable[..., Engine]) -> None:
    made = engine(slots=1)
    first = made.submit("Hello", max_tokens=400, sampling=GREEDY)
    next(iter(first))
    many = [made.submit("Many", max_tokens=30, sampling=GREEDY, client="many") for _ in range(6)]
    one = made.submit("One", max_tokens=2, sampling=GREEDY, client="one")
    first.cancel()
    one.result(30)
    assert sum(handle.done for handle in many) <= 2
    for handle in many:
        handle.cancel()
    started = time.monotonic()
    for handle in many:
        handle.result(10)
    assert time.monotonic() - started < 5
