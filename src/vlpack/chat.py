"""A conversation with a package: images and videos in any turn, and nothing computed twice that need not be.

Each turn's prompt is the whole conversation, as transformers has it. What the runtime's generator has seen of it stays
in its cache: the generator is taken back to where the two differ and shown the rest. A new image needs a new generator,
since the runtime takes images at its beginning only; features of images seen before are kept by the vision encoder
(`vlpack.vision_encoder`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlpack.answers import Answer, AnswerStream, Begun
from vlpack.errors import InputError, OptionError
from vlpack.genai import og
from vlpack.genai_model import append
from vlpack.memory import total_memory_bytes
from vlpack.package.genai_config import eos_ids
from vlpack.preprocess import (
    ImageSource,
    Message,
    ProcessedImages,
    ProcessedVideo,
    Prompt,
    VideoOptions,
    VideoSource,
    normalize_messages,
)
from vlpack.preprocess.literal import CONTROL
from vlpack.preprocess.messages import check_sources
from vlpack.reasoning import opens_reasoning, split_reasoning
from vlpack.sampling import Sampling, check_number

if TYPE_CHECKING:
    from vlpack.runtime import Model

SPARE = 1024
"""Tokens, at least, that a generator's cache has beyond what is needed; half of what is needed, if that is more.

The runtime fills all of it with zeros when it is made, so that room takes memory; without any, all is computed again.
"""
MEMORY_SHARE = 0.5
"""Of this machine's memory, what the cache of a conversation may take."""


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        user: the message, with images and videos as they were given.
        assistant: the message; ``reasoning_content`` is what a thinking model wrote before it.
        tokens: of both in the prompt of a later turn, so without reasoning where the template leaves it out.
        images: what the image processor made of them, when they came: a file may change later.
        videos: likewise.
    """

    user: Message
    assistant: Message = field(default_factory=dict)
    tokens: int = 0
    images: list[ProcessedImages] = field(default_factory=list)
    videos: list[ProcessedVideo] = field(default_factory=list)


_NOTHING = Turn({"role": "user", "content": "?"})
"""A question to come, for counting what stands before it."""


class Chat:
    """A conversation with a package. Make it with `Model.chat`.

    Args:
        model: the package.
        system: the system message.
        max_tokens: of an answer at most.
        sampling: how tokens are chosen.
        video_options: how videos are looked at whose parts do not say it themselves.
        context: tokens of the conversation and an answer at most; by default what the model's context and half of this
            machine's memory allow.
        allow_private_urls: let image URLs lead to this machine or its network.
        messages: a conversation to go on with, such as `saved` gave: an optional system message, then questions and
            answers in turn.
        special_tokens: what special tokens written in questions, answers and the system message become: ``control``
            tokens, as in transformers, or ``text``, for texts that come from strangers.
        **variables: of the chat template (``enable_thinking`` …).

    Raises:
        InputError: messages are of another form.
        OptionError: an option is out of its range.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        video_options: VideoOptions | None = None,
        context: int | None = None,
        allow_private_urls: bool = False,
        messages: Sequence[Message] = (),
        special_tokens: str = CONTROL,
        **variables: Any,
    ) -> None:
        check_number("max_tokens", max_tokens, 1, 2**31 - 1, whole=True)
        check_number("context", context, 2, 2**31 - 1, whole=True)
        self.model, self.max_tokens = model, max_tokens
        self.context = min(context or 2**31, model.context_length, _tokens_in_memory(model))
        self.allow_private_urls = allow_private_urls
        self._options = model.search_options(sampling)
        self._video_options, self._variables = video_options, {**variables, "special_tokens": special_tokens}
        if messages:
            normalize_messages(messages)  # anybody may have written them
        messages = list(messages)
        if messages and messages[0]["role"] == "system":
            if system is not None:
                raise InputError("There are two system messages.", "Leave one away.")
            system = _text_of(messages.pop(0))
        self.turns: list[Turn] = []
        self._stream: AnswerStream | None = None
        self._generator: og.Generator | None = None
        self._capacity = 0
        self._shown: list[Any] = []  # images and videos that the generator has seen
        self.system = system
        self._resume(messages)

    @property
    def system(self) -> str | None:
        """The system message; a new one counts from the next question on."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise InputError(f"The system message must be a text, not {type(text).__name__}.")
        before, self._system = getattr(self, "_system", None), text
        try:
            self._empty = self._prompt([_NOTHING]).input_ids.size
        except BaseException:
            self._system = before
            raise

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, in OpenAI's form, images and videos as they were given."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(message for turn in self.turns for message in (turn.user, turn.assistant))]

    @property
    def tokens(self) -> int:
        """Of the conversation so far, with the system message."""
        return self._empty + sum(turn.tokens for turn in self.turns)

    def ask(self, text: str, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> Answer:
        """The whole answer; arguments as for `stream`."""
        stream = self.stream(text, images, videos)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, text: str, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> AnswerStream:
        """The answer as it is made, piece by piece. An answer that is left early stays in the conversation as it is.

        Args:
            text: the question.
            images: files, URLs, bytes, PIL images or arrays, which the question is about.
            videos: files, folders of pictures, or lists of frames.

        Raises:
            InputError: the question, an image or a video is not usable, or the conversation does not fit the context;
                it stays as it was.
        """
        check_sources(images, videos)
        self._settle()
        parts = [
            *({"type": "image", "image": image} for image in images),
            *({"type": "video", "video": video} for video in videos),
        ]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        started = time.perf_counter()
        turn = self._looked_at({"role": "user", "content": content}, {})
        prompt = self._prompt([*self.turns, turn])
        turn.videos = [video._replace(seconds=0.0) for video in turn.videos]  # told once
        seconds = time.perf_counter() - started
        length = prompt.input_ids.size
        if length >= self.context:
            raise self._too_long(length)
        room = min(self.max_tokens, self.context - length)

        def ended(answer: Answer) -> None:
            self._stream = None
            if answer.finish_reason == "failed":
                self._generator = None
            if answer.finish_reason == "failed" or not answer.tokens:
                return
            reasoning, said = split_reasoning(answer.text, opens_reasoning(prompt.text))
            turn.assistant = {"role": "assistant", "content": said}
            if reasoning is not None:
                turn.assistant["reasoning_content"] = reasoning
            self._keep(turn)

        self._stream = AnswerStream(
            prompt,
            lambda: self._begin(prompt, room, [*self._seen(), *turn.images, *turn.videos]),
            self.model.tokenizer.stream(),
            eos_ids(self.model.config),
            room,
            seconds,
            ended,
        )
        return self._stream

    def drop(self, count: int = 1) -> None:
        """Forget the oldest turns.

        Raises:
            OptionError: there are not so many.
        """
        self._settle()
        if type(count) is not int or not 1 <= count <= len(self.turns):
            raise OptionError(f"{count!r} turns cannot be dropped; the conversation has {len(self.turns)}.")
        self.turns = self.turns[count:]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._settle()
        self.turns, self._generator, self._shown = [], None, []

    def warning(self) -> str | None:
        """That the next answer may not fit, and what could be dropped; None while there is room."""
        left = self.context - self.tokens
        if not self.turns or left > self.max_tokens:
            return None
        return (
            f"The conversation has {self.tokens} tokens; {left} are left for a question and its answer. "
            f"{self._could_be_dropped()}"
        )

    def _keep(self, turn: Turn) -> None:
        # counted alone: the whole conversation with each of its turns would take the square of its length
        turn.tokens = self._prompt([turn, _NOTHING]).input_ids.size - self._empty
        self.turns.append(turn)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _seen(self) -> Iterator[ProcessedImages | ProcessedVideo]:
        for turn in self.turns:
            yield from turn.images
            yield from turn.videos

    def _looked_at(self, user: Message, assistant: Message) -> Turn:
        """A turn whose images and videos are processed."""
        builder = self.model.prompts
        conversation = normalize_messages([user, assistant] if assistant else [user])
        images = [builder.processed_image(_given(image), self.allow_private_urls) for image in conversation.images]
        videos = [
            builder.processed_video(_given(video.source), video.options or self._video_options)
            for video in conversation.videos
        ]
        return Turn(user, dict(assistant), images=images, videos=videos)

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages.append(_without_sources(turn.user))
            if turn.assistant:
                messages.append(_without_sources(turn.assistant))
        images = [image for turn in turns for image in turn.images]
        return self.model.prompts(
            messages, images, [video for turn in turns for video in turn.videos], **self._variables
        )

    def _begin(self, prompt: Prompt, room: int, seen: list[Any]) -> Begun:
        ids = prompt.input_ids[0]
        generator, self._generator = self._generator, None
        needed = len(ids) + room
        alike = len(seen) == len(self._shown) and all(map(lambda a, b: a is b, seen, self._shown))
        if generator is not None and alike and needed <= self._capacity:
            cached = np.asarray(generator.get_sequence(0))[:-1]  # the last token is sampled, and not computed yet
            shared = min(len(cached), len(ids) - 1)
            differs = np.flatnonzero(cached[:shared] != ids[:shared])
            keep = int(differs[0]) if len(differs) else shared
            places = np.flatnonzero(ids == self.model.prompts.image_token_id)
            if keep > (places[-1] if len(places) else 0):
                self._generator = generator  # of which stands, after Control-C, what was computed before
                generator.rewind_to(keep)
                append(generator, prompt.input_ids[:, keep:], self._options)
                generator.generate_next_token()
                return Begun(generator, 0.0, keep)
        del generator  # its cache goes before another one comes
        capacity = min(self.context, needed + max(needed // 2, SPARE))
        begun = self.model.begin(prompt, {**self._options, "max_length": capacity})
        self._generator, self._capacity, self._shown = begun.generator, capacity, seen
        return begun

    def _resume(self, messages: Sequence[Message]) -> None:
        roles = [message.get("role") for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError(
                "A conversation to go on with has questions and answers in turn, of the roles user and assistant, "
                f"after the system message; this one has {', '.join(map(str, roles[:6]))}{' …' * (len(roles) > 6)}."
            )
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            turn = self._looked_at(user, assistant)
            turn.videos = [video._replace(seconds=0.0) for video in turn.videos]
            self._keep(turn)

    def _too_long(self, length: int) -> InputError:
        said = f"The conversation would have {length} tokens; {self.context} is the most, with the answer."
        if not self.turns:
            return InputError(said, "Shorten the question, or make images and videos smaller.")
        return InputError(said, self._could_be_dropped())

    def _could_be_dropped(self) -> str:
        listed = []
        for number, turn in enumerate(self.turns[:3], start=1):
            seen = [(len(turn.images), "image"), (len(turn.videos), "video")]
            what = "".join(f", {count} {name}{'s' * (count > 1)}" for count, name in seen if count)
            listed.append(f"turn {number} ({turn.tokens} tokens{what})")
        return f"Could be dropped, the oldest first: {', '.join(listed)}."


def _tokens_in_memory(model: Model) -> int:
    there = total_memory_bytes()
    return int(there * MEMORY_SHARE) // model.cache_bytes(1) if there else 2**31


def _given(source: Any) -> Any:
    if source is None:
        raise InputError("An image or video part of a message has no source.", 'Write {"type": "image", "path": "…"}.')
    return source


def _text_of(message: Message) -> str:
    conversation = normalize_messages([message])
    if conversation.images or conversation.videos:
        raise InputError("The system message has images or videos.", "Give them with the first question.")
    content = conversation.messages[0].get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _without_sources(message: Message) -> dict[str, Any]:
    """For the prompt: the sources are processed, and given in order."""
    (plain,) = normalize_messages([message]).messages
    if isinstance(plain.get("content"), list):
        plain["content"] = [
            {"type": part["type"]} if part["type"] in ("image", "video") else part for part in plain["content"]
        ]
    return plain
