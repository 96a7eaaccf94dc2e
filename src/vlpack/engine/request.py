"""A request in the engine, and the handle by which the caller receives its answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vlpack.decoding.graphs import Array
from vlpack.decoding.images import Unseen
from vlpack.decoding.prefixes import Tokens
from vlpack.decoding.slots import Slot
from vlpack.engine.constraints import Constraint
from vlpack.engine.drafting import Drafter
from vlpack.errors import VlpackError
from vlpack.preprocess import Prompt, TextStream
from vlpack.runtime.answer import Answer
from vlpack.runtime.sampler import Sampler, TokenLogprob, logprob_of
from vlpack.runtime.stopping import StopTexts
from vlpack.system import peak_memory_bytes


@dataclass
class EngineAnswer(Answer):
    """A finished answer of the engine.

    Attributes:
        parsed: for a request with ``schema``, the parsed answer: an object of the pydantic class, or JSON's own types;
            None for other requests, or if the answer was cut off before its end.
        logprobs: log-probabilities of each token; None if they were not requested.
    """

    parsed: Any = None
    logprobs: list[TokenLogprob] | None = None


class Handle:
    """The caller's handle of a submitted request.

    Iterating over it yields pieces of text as they are generated; `result` waits for the whole answer. Both work in any
    thread. In an event loop, ``async for piece in handle`` and ``await handle`` do the same.

    Attributes:
        prompt: prompt of the request.
        on_cancel: set by the engine: function that cancels the request; None when the answer is finished.
        logprobs: log-probabilities of the tokens so far, if they were requested; a token's is there before its text.
    """

    def __init__(self, prompt: Prompt, engine: object) -> None:
        self.prompt = prompt
        self._engine = engine  # keeps the engine alive, because garbage collection closes it
        self.on_cancel: Callable[[], None] | None = None
        self.logprobs: list[TokenLogprob] = []
        self._pieces: list[str] = []
        self._answer: EngineAnswer | None = None
        self._error: BaseException | None = None
        self._done = False
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []

    @property
    def done(self) -> bool:
        """Whether the answer is finished, was cancelled or has failed."""
        return self._done

    @property
    def answer(self) -> EngineAnswer:
        """The whole answer; waits for its end, like `result`."""
        return self.result()

    def cancel(self) -> None:
        """Ends the answer where it is, with the finish_reason ``interrupted``; a finished answer is not changed."""
        on_cancel = self.on_cancel
        if on_cancel is not None:
            on_cancel()

    def result(self, timeout: float | None = None) -> EngineAnswer:
        """Waits for the end of the answer and returns all of it.

        Args:
            timeout: largest number of seconds to wait; None for no limit.

        Raises:
            TimeoutError: the answer was not finished in time.
            VlpackError: the request failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._done:
                left = 0.5 if end is None else min(0.5, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"The answer did not come within {timeout} seconds.")
                self._changed.wait(left)  # on Windows, Ctrl+C does not interrupt a wait without a timeout
        return self._outcome()

    def __iter__(self) -> Iterator[str]:
        place = 0
        while True:
            with self._changed:
                while place == len(self._pieces) and not self._done:
                    self._changed.wait(0.5)
                pieces, done = self._pieces[place:], self._done
            yield from pieces
            place += len(pieces)
            if done and place == len(self._pieces):
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[str]:
        place, changed = 0, asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                changed.clear()
                with self._changed:
                    pieces, done = self._pieces[place:], self._done
                for piece in pieces:
                    yield piece
                place += len(pieces)
                if done:
                    self._outcome()
                    return
                if not pieces:
                    await changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def __await__(self) -> Generator[Any, None, EngineAnswer]:
        async def whole() -> EngineAnswer:
            async for _ in self:
                pass
            return self._outcome()

        return whole().__await__()

    def _outcome(self) -> EngineAnswer:
        if self._error is not None:
            raise self._error
        assert self._answer is not None, "done without an error"
        return self._answer

    def push(self, piece: str) -> None:
        """Adds a piece of text; called by the engine."""
        with self._changed:
            self._pieces.append(piece)
            self._tell()

    def finish(self, answer: EngineAnswer, error: BaseException | None = None) -> None:
        """Ends the request with its answer or error; called by the engine."""
        with self._changed:
            self._answer, self._error, self._done, self.on_cancel = answer, error, True, None
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            try:
                wake()
            except RuntimeError:  # the event loop was closed, so nothing waits there any more
                continue


@dataclass(eq=False)
class Request:
    """A request with its state in the scheduler.

    Args:
        handle: handle of the caller.
        prompt: prompt as tensors.
        tokens: tokens of the prompt.
        positions: positions of the prompt's tokens, ``[3, S]``.
        sampler: sampler that chooses the answer's tokens.
        text: decoder of the answer's tokens to text.
        stop: texts that end the answer.
        ends: tokens that end the answer.
        max_tokens: largest number of tokens of the answer; the slot has room for as many.
        constraint: constraint that the answer obeys; None if there is none.
        logprobs: number of likely tokens reported with each token of the answer; None for no log-probabilities.
        client: identity of the client for turns in the queue.
        preprocess_seconds: time that making the prompt took, in seconds; None if the caller gave a finished prompt.
        drafter: drafter of the answer's next tokens; None if none are drafted.
    """

    handle: Handle
    prompt: Prompt
    tokens: Tokens
    positions: Array
    sampler: Sampler
    text: TextStream
    stop: StopTexts
    ends: set[int]
    max_tokens: int
    constraint: Constraint | None = None
    logprobs: int | None = None
    client: object = None
    preprocess_seconds: float | None = None
    drafter: Drafter | None = None

    slot: Slot | None = None
    features: Future[Array] | None = None
    """Features of the images of `unseen`, which the vision encoder computes in another thread."""
    unseen: Unseen | None = None
    cancelled: bool = False
    mask: Future[Array] | None = None
    answer: EngineAnswer = field(init=False)

    def __post_init__(self) -> None:
        self.answer = EngineAnswer("", [], "interrupted")
        if self.logprobs is not None:
            self.answer.logprobs = self.handle.logprobs
        stats, prompt = self.answer.stats, self.prompt
        stats.prompt_tokens, stats.video_tokens = prompt.input_ids.shape[1], prompt.num_video_tokens
        stats.image_tokens = int(prompt.num_image_tokens.sum()) - stats.video_tokens
        stats.video_frames = sum(len(video.frames_indices) for video in prompt.videos)
        stats.video_seconds = sum(video.seconds for video in prompt.videos)
        stats.preprocess_seconds = self.preprocess_seconds
        self._submitted = time.perf_counter()
        self._first = 0.0
        self._next_position = int(self.positions.max(initial=-1)) + 1

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt was processed, so that the answer has begun."""
        return bool(self.answer.tokens)

    @property
    def position(self) -> int:
        """The position of the answer's last token, which is the same on all axes."""
        return self._next_position + len(self.answer.tokens) - 1

    def draft(self, price: float, most: int) -> list[int]:
        """Drafts the next tokens, which a step checks.

        Args:
            price: cost of each draft token, in tokens.
            most: largest number of draft tokens.
        """
        most = min(
            most, self.max_tokens - len(self.answer.tokens) - 1
        )  # a step makes one token in addition to accepted draft tokens
        if self.drafter is None or most < 1:
            return []
        if self.constraint is None:
            return self.drafter.draft(price, most)
        return self.constraint.valid(self.drafter.draft(price, most, self.constraint.forced()))

    def choose(self, logits: Array) -> bool:
        """Chooses the next token from logits ``[V]``; returns whether the answer is finished with it."""
        allowed = None if self.mask is None else self.mask.result()
        raw = logits.copy() if self.logprobs is not None else logits
        token = self.sampler(logits, allowed)
        if self.logprobs is not None and self.answer.logprobs is not None:
            self.answer.logprobs.append(logprob_of(raw, token, self.logprobs))
        return self._push(token)

    def _push(self, token: int) -> bool:
        answer, stats = self.answer, self.answer.stats
        now = time.perf_counter()
        if not answer.tokens:
            self._first = now
            stats.first_token_seconds = (stats.preprocess_seconds or 0.0) + now - self._submitted
        answer.tokens.append(token)
        if self.drafter is not None:
            self.drafter.push(token)
        stats.new_tokens += 1
        stats.decode_seconds = now - self._first
        stopped = token in self.ends
        # an end token that the grammar allows ends the answer, so it is not passed on to the constraint
        over = self.constraint is not None and not stopped and self.constraint.push(token)
        if not stopped:
            piece, stopped = self.stop.push(self.text.push(token))
            self._say(piece)
            if stopped:
                answer.finish_reason = "stop"
                return True
        if stopped or over:
            answer.finish_reason = "stop"
        elif len(answer.tokens) >= self.max_tokens:
            answer.finish_reason = "length"
        else:
            return False
        piece, stopped = self.stop.push(self.text.flush())
        if stopped:
            answer.finish_reason = "stop"
        else:
            piece += self.stop.flush()
        self._say(piece)
        return True

    def _say(self, piece: str) -> None:
        if piece:
            self.answer.text += piece
            self.handle.push(piece)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the request and passes the answer or error to the caller's handle."""
        answer = self.answer
        answer.stats.peak_memory = peak_memory_bytes()
        if error is not None:
            answer.finish_reason = "failed"
        grammar = self.constraint and self.constraint.grammar
        if grammar and grammar.is_json and answer.finish_reason == "stop":
            try:
                answer.parsed = grammar.parse(answer.text)
            except Exception as wrong:  # a stop text cut it off, or the user's class rejects it
                error = error or VlpackError(f"The answer is not what the schema takes: {wrong}")
        self.handle.finish(answer, error)
