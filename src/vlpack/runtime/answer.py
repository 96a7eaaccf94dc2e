"""Answers of a package: the text as a stream, the finished answer, and its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vlpack.errors import PackageError
from vlpack.preprocess import Prompt, TextStream
from vlpack.runtime.stopping import StopTexts
from vlpack.system import peak_memory_bytes


@dataclass
class Stats:
    """Statistics of an answer: numbers of tokens, seconds, and bytes of peak memory.

    A time that was not measured is None. ``preprocess_seconds`` is None for a prompt that was already made. If the
    runtime encodes the images (``vision_provider="runtime"``), ``vision_seconds`` and ``prefill_seconds`` are measured
    only with ``timing=True``. ``video_seconds``, the time for reading and resizing videos, is a part of
    ``preprocess_seconds``. ``reused_tokens`` is the number of prompt tokens that were already in the key/value cache
    from earlier turns of a conversation.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    video_frames: int = 0
    new_tokens: int = 0
    preprocess_seconds: float | None = None
    video_seconds: float = 0.0
    vision_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed in tokens per second, without the first token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass
class Answer:
    """A finished answer.

    Attributes:
        text: text of the answer without special tokens.
        tokens: ids of all generated tokens, including the end token.
        finish_reason: ``stop`` (the model ended the answer, or a stop text occurred), ``length`` (max_tokens or the end
            of the context was reached), ``interrupted`` (the stream was closed early), or ``failed``.
        stats: statistics of the answer.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats = field(default_factory=Stats)


class TokenGenerator(Protocol):
    """A generator of an answer's tokens: the runtime's own, or `vlpack.runtime.kept_states.KeptGenerator`."""

    def get_next_tokens(self) -> Any:
        """The token that was generated last, in a sequence or array of one."""

    def is_done(self) -> bool:
        """Whether there is no room for another token, or the answer is over."""

    def generate_next_token(self) -> None:
        """Generates the next token."""


class Begun(NamedTuple):
    """A generator that has processed a prompt and generated the first token of the answer.

    Attributes:
        generator: the generator.
        vision_seconds: seconds spent on encoding images; None if it was not measured.
        reused_tokens: number of prompt tokens that were already in the generator's cache.
    """

    generator: TokenGenerator
    vision_seconds: float | None
    reused_tokens: int = 0


class AnswerStream(Iterator[str]):
    """An iterator over the pieces of an answer's text. Closing it early frees the runtime's memory.

    Attributes:
        answer: the answer so far; it is complete when the iterator ends.
        prompt: the prompt that is answered.

    Args:
        prompt: the prompt to answer.
        begin: function that makes the runtime process the prompt.
        text: decoder from the package's tokenizer.
        ends: ids of the tokens that end an answer.
        max_tokens: maximum number of tokens of the answer; it is shorter if the generator's cache fills up first.
        preprocess_seconds: seconds spent on making the prompt; None if it was already made.
        ended: called with the answer when a started stream ends for any reason.
        stop: texts at which the answer ends; the text of the answer does not include them.
    """

    def __init__(
        self,
        prompt: Prompt,
        begin: Callable[[], Begun],
        text: TextStream,
        ends: set[int],
        max_tokens: int,
        preprocess_seconds: float | None,
        ended: Callable[[Answer], None] | None = None,
        stop: StopTexts | None = None,
    ) -> None:
        self._stop = stop or StopTexts()
        self.answer, self.prompt = Answer("", [], "interrupted"), prompt
        stats = self.answer.stats
        stats.prompt_tokens, stats.video_tokens = prompt.input_ids.shape[1], prompt.num_video_tokens
        stats.image_tokens = int(prompt.num_image_tokens.sum()) - stats.video_tokens
        stats.video_frames = sum(len(video.frames_indices) for video in prompt.videos)
        stats.video_seconds = sum(video.seconds for video in prompt.videos)
        stats.preprocess_seconds = preprocess_seconds
        self._pieces = self._run(begin, text, ends, max_tokens, ended)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except RuntimeError as error:  # the only error class of onnxruntime-genai
            raise PackageError(f"The runtime failed: {str(error).strip()[:500]}") from error

    def close(self) -> None:
        """Stops the answer and frees the runtime's memory."""
        self._pieces.close()

    def _run(
        self,
        begin: Callable[[], Begun],
        text: TextStream,
        ends: set[int],
        max_tokens: int,
        ended: Callable[[Answer], None] | None,
    ) -> Generator[str, None, None]:
        try:
            yield from self._tokens(begin, text, ends, max_tokens)
        except (GeneratorExit, KeyboardInterrupt):
            raise  # the answer so far is kept
        except BaseException:
            self.answer.finish_reason = "failed"
            raise
        finally:
            if ended is not None:
                ended(self.answer)

    def _tokens(
        self, begin: Callable[[], Begun], text: TextStream, ends: set[int], max_tokens: int
    ) -> Generator[str, None, None]:
        answer, stats = self.answer, self.answer.stats
        started = time.perf_counter()
        generator, stats.vision_seconds, stats.reused_tokens = begin()
        first = time.perf_counter()
        if stats.vision_seconds is not None:
            stats.prefill_seconds = first - started - stats.vision_seconds
        stats.first_token_seconds = (stats.preprocess_seconds or 0.0) + first - started
        while True:
            token = int(generator.get_next_tokens()[0])
            answer.tokens.append(token)
            stats.new_tokens += 1
            stats.decode_seconds = time.perf_counter() - first
            stats.peak_memory = peak_memory_bytes()
            if token in ends:
                answer.finish_reason = "stop"
                break
            piece, stopped = self._stop.push(text.push(token))
            if piece:
                answer.text += piece
                yield piece
            if stopped:
                answer.finish_reason = "stop"
                return
            if len(answer.tokens) >= max_tokens or generator.is_done():  # max_length is reached
                answer.finish_reason = "length"
                break
            generator.generate_next_token()
        piece, stopped = self._stop.push(text.flush())
        if stopped:
            answer.finish_reason = "stop"
        else:
            piece += self._stop.flush()
        if piece:
            answer.text += piece
            yield piece
