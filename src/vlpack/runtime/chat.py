"""A conversation with a package, with images and videos in any turn and reuse of the key/value cache.

The prompt of each turn is the whole conversation, as in transformers. The runtime's generator is rewound to the first
token at which its sequence and the new prompt differ, and processes only the rest. A turn with a new image needs a new
generator, since the runtime accepts images only at the start; the vision encoder (`vlpack.runtime.vision`) keeps the
features of earlier images. The states of linear attention cannot be taken back, and the runtime would corrupt them
silently: vlpack itself decodes conversations with such models on the CPU (`vlpack.runtime.kept_states`). For other
providers, a turn whose prompt is not a continuation of the generator's sequence needs a new generator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlpack.errors import InputError, OptionError
from vlpack.package.genai import eos_ids
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
from vlpack.runtime.answer import Answer, AnswerStream, Begun
from vlpack.runtime.genai import og
from vlpack.runtime.genai_model import append
from vlpack.runtime.reasoning import opens_reasoning, split_reasoning
from vlpack.runtime.sampler import choice_of
from vlpack.runtime.sampling import Sampling, check_number
from vlpack.system import total_memory_bytes

if TYPE_CHECKING:
    from vlpack.runtime.model import Model

SPARE = 1024
"""Minimum spare tokens in a generator's cache for later turns; half of the needed tokens are spared if that is more.

The runtime fills the whole cache with zeros when it is made, so spare room takes memory; without it, the next turn
would compute the whole conversation again.
"""
MEMORY_SHARE = 0.5
"""Maximum share of this machine's memory for the cache of a conversation."""


@dataclass
class Turn:
    """One turn of a conversation: a question and its answer.

    Attributes:
        user: message of the user, with images and videos as they were given.
        assistant: message of the model; ``reasoning_content`` is what a thinking model wrote before its answer.
        tokens: number of tokens of both messages in the prompt of a later turn, so without reasoning if the chat
            template leaves it out.
        images: the processed images, kept because a file may change later.
        videos: the processed videos, kept for the same reason.
    """

    user: Message
    assistant: Message = field(default_factory=dict)
    tokens: int = 0
    images: list[ProcessedImages] = field(default_factory=list)
    videos: list[ProcessedVideo] = field(default_factory=list)


_NOTHING = Turn({"role": "user", "content": "?"})
"""A placeholder for the next question, used to count the tokens before it."""


class Chat:
    """A conversation with a package, made by `Model.chat`.

    Args:
        model: the loaded package.
        system: system message.
        max_tokens: maximum number of tokens of an answer.
        sampling: how the next token is chosen.
        video_options: frame and size options for videos whose message parts have none.
        context: maximum number of tokens of the conversation with an answer; by default what the model's context and
            half of this machine's memory allow.
        allow_private_urls: whether image URLs may lead to this machine or its private network.
        messages: conversation to continue, such as `Chat.messages` of an earlier one: an optional system message,
            followed by alternating questions and answers.
        special_tokens: what special tokens written in questions, answers and the system message become: ``control``
            tokens, as in transformers, or plain ``text``, for texts from untrusted people.
        **variables: variables of the chat template, such as ``enable_thinking``.

    Raises:
        InputError: the messages do not have this form.
        OptionError: an option is out of range.
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
        self._options, self._choice = (
            model.search_options(sampling),
            choice_of(model.config.get("search", {}), sampling),
        )
        self._video_options, self._variables = video_options, {**variables, "special_tokens": special_tokens}
        if messages:
            normalize_messages(messages)  # checks them: they may come from an untrusted file
        messages = list(messages)
        if messages and messages[0]["role"] == "system":
            if system is not None:
                raise InputError(
                    "There are two system messages: one in the messages, and one given separately.", "Leave one out."
                )
            system = _text_of(messages.pop(0))
        self.turns: list[Turn] = []
        self._stream: AnswerStream | None = None
        self._generator: og.Generator | None = None
        self._capacity = 0
        self._shown: list[Any] = []  # images and videos that the generator has processed
        self._kept = model.kept_conversation(self.context)
        self.system = system
        self._resume(messages)

    @property
    def system(self) -> str | None:
        """The system message; a change takes effect with the next question."""
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
        """The conversation so far in OpenAI's format, with images and videos as they were given."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(message for turn in self.turns for message in (turn.user, turn.assistant))]

    @property
    def tokens(self) -> int:
        """Number of tokens of the conversation so far, including the system message."""
        return self._empty + sum(turn.tokens for turn in self.turns)

    def ask(self, text: str, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> Answer:
        """Answers a question and returns the whole answer; the arguments are those of `stream`."""
        stream = self.stream(text, images, videos)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, text: str, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> AnswerStream:
        """Answers a question and returns the answer as a stream of text.

        If the stream is closed early, the conversation keeps the answer so far.

        Args:
            text: the question.
            images: images that the question is about, as paths, URLs, bytes, PIL images or arrays.
            videos: videos that the question is about, as files, folders of images or lists of frames.

        Raises:
            InputError: the question, an image or a video cannot be used, or the conversation does not fit the context.
                The conversation is left unchanged.
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
        turn.videos = [video._replace(seconds=0.0) for video in turn.videos]  # count the time in this turn only
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
        """Removes the oldest turns from the conversation.

        Args:
            count: number of turns to remove.

        Raises:
            OptionError: the conversation has fewer turns.
        """
        self._settle()
        if type(count) is not int or not 1 <= count <= len(self.turns):
            raise OptionError(f"{count!r} turns cannot be dropped; the conversation has {len(self.turns)}.")
        self.turns = self.turns[count:]

    def reset(self) -> None:
        """Removes all turns from the conversation and keeps the system message."""
        self._settle()
        self.turns, self._generator, self._shown = [], None, []

    def warning(self) -> str | None:
        """A warning that the next answer may not fit the context, with turns to drop; None while there is room."""
        left = self.context - self.tokens
        if not self.turns or left > self.max_tokens:
            return None
        return (
            f"The conversation has {self.tokens} tokens; {left} are left for a question and its answer. "
            f"{self._could_be_dropped()}"
        )

    def _keep(self, turn: Turn) -> None:
        # Counted by itself: counting the whole conversation after each turn would take quadratic time.
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
        """A turn of these messages, with its images and videos processed."""
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
        if self._kept is not None:
            return self._kept.begin(prompt, self._choice)
        ids = prompt.input_ids[0]
        generator, self._generator = self._generator, None
        needed = len(ids) + room
        alike = len(seen) == len(self._shown) and all(map(lambda a, b: a is b, seen, self._shown))
        if generator is not None and alike and needed <= self._capacity:
            keep = self._common(generator, ids)
            places = np.flatnonzero(ids == self.model.prompts.image_token_id)
            if keep > (places[-1] if len(places) else 0):
                self._generator = generator  # set first: after Control-C its computed part is still valid
                if self.model.keeps_states:
                    generator.get_logits()  # computes the last token, which may only have been sampled
                else:
                    generator.rewind_to(keep)
                append(generator, prompt.input_ids[:, keep:], self._options)
                generator.generate_next_token()
                return Begun(generator, 0.0, keep)
        del generator  # free its cache before the next one is allocated
        capacity = min(self.context, needed + max(needed // 2, SPARE))
        begun = self.model.begin(prompt, {**self._options, "max_length": capacity})
        self._generator, self._capacity, self._shown = begun.generator, capacity, seen
        return begun

    def _common(self, generator: og.Generator, ids: Any) -> int:
        """The number of tokens of a prompt ``[S]`` that a generator has seen and need not compute again."""
        sequence = np.asarray(generator.get_sequence(0))
        if self.model.keeps_states:  # states cannot be taken back, so the prompt must continue the whole sequence
            length = len(sequence)
            return length if length < len(ids) and np.array_equal(sequence, ids[:length]) else 0
        cached = sequence[:-1]  # the last token is sampled but not in the cache yet
        shared = min(len(cached), len(ids) - 1)
        differs = np.flatnonzero(cached[:shared] != ids[:shared])
        return int(differs[0]) if len(differs) else shared

    def _resume(self, messages: Sequence[Message]) -> None:
        roles = [message.get("role") for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError(
                "A conversation to continue must have questions and answers in turn, of the roles user and assistant, "
                f"after the system message; this one has {', '.join(map(str, roles[:6]))}{' …' * (len(roles) > 6)}."
            )
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            turn = self._looked_at(user, assistant)
            turn.videos = [video._replace(seconds=0.0) for video in turn.videos]
            self._keep(turn)

    def _too_long(self, length: int) -> InputError:
        said = f"The conversation would have {length} tokens; {self.context} is the most, including the answer."
        if not self.turns:
            return InputError(said, "Shorten the question, or make images and videos smaller.")
        return InputError(said, self._could_be_dropped())

    def _could_be_dropped(self) -> str:
        listed = []
        for number, turn in enumerate(self.turns[:3], start=1):
            seen = [(len(turn.images), "image"), (len(turn.videos), "video")]
            what = "".join(f", {count} {name}{'s' * (count > 1)}" for count, name in seen if count)
            listed.append(f"turn {number} ({turn.tokens} tokens{what})")
        return f"Turns to drop, the oldest first: {', '.join(listed)}."


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
        raise InputError("The system message has images or videos.", "Put them into the first question.")
    content = conversation.messages[0].get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _without_sources(message: Message) -> dict[str, Any]:
    """A copy of a message whose image and video parts have no sources, which are given to the prompt separately."""
    (plain,) = normalize_messages([message]).messages
    if isinstance(plain.get("content"), list):
        plain["content"] = [
            {"type": part["type"]} if part["type"] in ("image", "video") else part for part in plain["content"]
        ]
    return plain
