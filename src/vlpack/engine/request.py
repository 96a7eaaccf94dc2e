"""A request on its way through the engine, and the handle by which whoever asked follows it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vlpack.engine.constraints import Constraint
from vlpack.engine.graphs import Array
from vlpack.engine.prefixes import Tokens
from vlpack.engine.sampler import Sampler, TokenLogprob, logprob_of
from vlpack.engine.slots import Slot
from vlpack.errors import VlpackError
from vlpack.preprocess import Prompt, TextStream
from vlpack.runtime.answer import Answer
from vlpack.runtime.stopping import StopTexts
from vlpack.system import peak_memory_bytes


@dataclass
class EngineAnswer(Answer):
    """A finished answer of the engine.

    Attributes:
        parsed: of an answer to a ``schema``: an object of the pydantic class, or what the JSON says; None where the
            answer was cut off before its end.
        logprobs: of each token; None where they were not asked for.
    """

    parsed: Any = None
    logprobs: list[TokenLogprob] | None = None


class Handle:
    """A request that was submitted: iterate for the text as it comes, or wait for `result`; both from any thread.

    In an event loop, ``async for piece in handle`` and ``await handle`` do the same.

    Attributes:
        prompt: what is answered.
        on_cancel: for the engine: what ends the answer; None where it is over.
        logprobs: of the tokens so far, where they were asked for. A token's is there before its text.
    """

    def __init__(self, prompt: Prompt, engine: object) -> None:
        self.prompt = prompt
        self._engine = engine  # which is closed when nobody has it any more
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
        """The whole answer, as `result` gives it."""
        return self.result()

    def cancel(self) -> None:
        """End the answer as it stands; its finish_reason is ``interrupted``. What is finished stays as it is."""
        on_cancel = self.on_cancel
        if on_cancel is not None:
            on_cancel()

    def result(self, timeout: float | None = None) -> EngineAnswer:
        """The whole answer, waiting for its end.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it did not come in time.
            VlpackError: the request failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._done:
                left = 0.5 if end is None else min(0.5, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"The answer did not come within {timeout} seconds.")
                self._changed.wait(left)  # Windows hears no interruption in a wait without an end
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
        """For the engine: one more piece of text."""
        with self._changed:
            self._pieces.append(piece)
            self._tell()

    def finish(self, answer: EngineAnswer, error: BaseException | None = None) -> None:
        """For the engine: the answer is over."""
        with self._changed:
            self._answer, self._error, self._done, self.on_cancel = answer, error, True, None
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            try:
                wake()
            except RuntimeError:  # the event loop was closed, so nobody listens there any more
                continue


@dataclass(eq=False)
class Request:
    """A request with all that the scheduler keeps of it.

    Args:
        handle: of whoever asked.
        prompt: as tensors.
        tokens: of the prompt.
        positions: ``[3, S]`` of the prompt.
        sampler: of the answer.
        text: decodes the answer's tokens.
        stop: texts that end it.
        ends: tokens that end it.
        max_tokens: of the answer at most, and as many as the slot has room for.
        constraint: that it obeys, if any.
        logprobs: number of likely tokens that are reported beside each token of the answer; None reports none.
        client: whose turn in the queue it takes.
        preprocess_seconds: that making the prompt took; None where it was ready.
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

    slot: Slot | None = None
    features: Future[Array] | None = None
    """Of the images from `first_image` on, while or after they are looked at."""
    first_image: int = 0
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
        """Whether the whole prompt was shown to the model."""
        return bool(self.answer.tokens)

    @property
    def position(self) -> int:
        """Of the answer's last token, on all axes."""
        return self._next_position + len(self.answer.tokens) - 1

    def choose(self, logits: Array) -> bool:
        """Take the next token from the logits ``[V]``; whether the answer is finished with it."""
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
        stats.new_tokens += 1
        stats.decode_seconds = now - self._first
        stopped = token in self.ends
        # an end token that a grammar allows is its end; one that stands for text in it would be pushed, too
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
        """Tell whoever asked that the answer is over."""
        answer = self.answer
        answer.stats.peak_memory = peak_memory_bytes()
        if error is not None:
            answer.finish_reason = "failed"
        grammar = self.constraint and self.constraint.grammar
        if grammar and grammar.is_json and answer.finish_reason == "stop":
            try:
                answer.parsed = grammar.parse(answer.text)
            except Exception as wrong:  # a stop text cut it, or the class, which is the user's, wants more
                error = error or VlpackError(f"The answer is not what the schema takes: {wrong}")
        self.handle.finish(answer, error)
