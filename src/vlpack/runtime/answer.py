"""What a package answers, as it comes, and what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from vlpack.errors import PackageError
from vlpack.preprocess import Prompt, TextStream
from vlpack.runtime.genai import og
from vlpack.runtime.stopping import StopTexts
from vlpack.system import peak_memory_bytes


@dataclass
class Stats:
    """What an answer took: seconds, tokens, bytes.

    What was not measured is None: preprocessing of a prompt that was ready, and, with images whose features the runtime
    makes (``vision_provider="runtime"``), how the time up to the first token divides into vision and prefill, unless
    ``timing`` was asked for. ``video_seconds`` is what reading and resizing videos took, and a part of preprocessing.
    ``reused_tokens`` of the prompt were in the cache already, from earlier turns of a conversation.
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
        """Of decoding, the first token not counted."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass
class Answer:
    """A finished answer.

    Attributes:
        text: without special tokens.
        tokens: as they were generated, an end token included.
        finish_reason: ``stop`` (the model ended, or came to one of the texts to stop at), ``length`` (max_tokens or the
            context's end was reached), ``interrupted`` (the stream was left before), or ``failed``.
        stats: what it took.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats = field(default_factory=Stats)


class Begun(NamedTuple):
    """A generator that has seen a prompt and made the first token of the answer.

    Attributes:
        generator: of the runtime.
        vision_seconds: what looking at images took; None where it was not measured.
        reused_tokens: of the prompt that it had seen before.
    """

    generator: og.Generator
    vision_seconds: float | None
    reused_tokens: int = 0


class AnswerStream(Iterator[str]):
    """Iterates over the answer's text; `answer` is complete when it ends. Leaving early frees the runtime's state.

    `prompt` is what is answered.

    Args:
        prompt: what is answered.
        begin: shows it to the runtime.
        text: of the package's tokenizer.
        ends: tokens that end an answer.
        max_tokens: of the answer at most; fewer where the generator has no room for them.
        preprocess_seconds: what making the prompt took.
        ended: told the answer when the stream ends, however it does, if it was begun at all.
        stop: texts that end an answer, which does not have them.
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
        except RuntimeError as error:  # onnxruntime-genai's only kind
            raise PackageError(f"The runtime failed: {str(error).strip()[:500]}") from error

    def close(self) -> None:
        """Stop, and free the runtime's state."""
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
            raise  # the answer stands as far as it came
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
