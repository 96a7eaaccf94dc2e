"""Stopping an answer at any moment keeps the conversation and its cached tokens."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from parity import Reference
from runtime.test_chat import GREEDY, TINY, TOKENS, TURNS, asked, made, model, wanted
from tiny import Tiny
from vlpack.runtime.model import Model

__all__ = ["made", "model"]  # fixtures


def test_an_abandoned_answer_stays_as_it_is(
    model: Callable[..., Model], reference: Callable[[Tiny], Reference], made: list[str]
) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY)
    stream = chat.stream(*TURNS[0])
    pieces = [next(stream), next(stream)]
    stream.close()
    assert stream.answer.finish_reason == "interrupted"
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    expected = wanted(chat, asked("Go on.", []), reference(TINY))
    other = chat.stream("Go on.")
    next(other)
    assert chat.ask("Go on.").tokens  # a new question ends the answer before it
    assert [turn.user["content"] for turn in chat.turns[1:]] == ["Go on.", "Go on."]
    assert made.count("generator") == 1
    assert other.answer.tokens == expected[: len(other.answer.tokens)]


def test_stopped_before_the_first_token(
    model: Callable[..., Model],
    reference: Callable[[Tiny], Reference],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY)
    chat.ask(*TURNS[0])
    before = chat.messages
    question = "Tell me at length, in many words, what else there is to be seen, and where, and why it is."
    expected = wanted(chat, asked(question, []), reference(TINY))
    monkeypatch.setitem(chat._options, "chunk_size", 8)
    shown: list[int] = []

    class Stopped:
        """A generator that is interrupted by Control-C at its second chunk."""

        def __init__(self, generator: Any) -> None:
            self.generator = generator

        def __getattr__(self, name: str) -> Any:
            return getattr(self.generator, name)

        def append_tokens(self, ids: Any) -> None:
            self.generator.append_tokens(ids)
            shown.append(ids.size)
            if len(shown) == 2:
                raise KeyboardInterrupt

    chat._generator = Stopped(chat._generator)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(question)
    assert (shown, chat.messages) == ([8, 8], before)
    again = chat.ask(question)
    assert again.tokens == expected
    assert len(shown) > 3
    assert made.count("generator") == 1


def test_stopped_while_an_image_is_encoded(model: Callable[..., Model]) -> None:
    """Control-C stops the session, which runs in another thread; the image is encoded again with the next question."""
    told: list[bool] = []
    loaded = model(TINY.but(seed=5))
    assert loaded.vision is not None
    session = loaded.vision._open(loaded.vision._graph, 1)

    class Slow:
        def run(self, outputs: Any, feed: Any, options: Any) -> Any:
            if told:
                return session.run(outputs, feed, options)
            signal.raise_signal(signal.SIGINT)
            end = time.monotonic() + 60
            while not options.terminate and time.monotonic() < end:
                time.sleep(0.01)
            told.append(options.terminate)
            raise RuntimeError("terminated")

    loaded.vision._session = Slow()
    chat = loaded.chat(max_tokens=TOKENS, sampling=GREEDY)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(*TURNS[0])
    end = time.monotonic() + 60
    while (
        not told and time.monotonic() < end
    ):  # an executor that is interrupted while it starts does not wait for its thread
        time.sleep(0.01)
    assert (told, chat.messages) == ([True], [])
    assert chat.ask(*TURNS[0]).tokens
