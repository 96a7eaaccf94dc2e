"""`vlpack.Engine`: answers many requests at once with one package, in plain onnxruntime."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlpack.decoding.graphs import Graphs
from vlpack.decoding.images import positions_of
from vlpack.decoding.prefixes import tokens_of
from vlpack.decoding.slots import Slots, default_context
from vlpack.engine.constraints import Grammars, grammar_of
from vlpack.engine.counters import Counters
from vlpack.engine.drafting import Drafter
from vlpack.engine.queue import FairQueue
from vlpack.engine.request import EngineAnswer, Handle, Request
from vlpack.engine.scheduler import Scheduler
from vlpack.errors import InputError, OptionError, PackageError, option
from vlpack.ort.saturation import warn_of_saturation
from vlpack.package.genai import eos_ids
from vlpack.package.manifest import graph_files
from vlpack.preprocess import ImageSource, Message, Prompt, PromptBuilder, VideoOptions, VideoSource
from vlpack.preprocess.images import check_pixel_limits
from vlpack.preprocess.literal import CONTROL
from vlpack.preprocess.messages import check_sources
from vlpack.preprocess.prompt_builder import check_vision_start
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.runtime.genai_model import open_package, read_config, vision_encoder
from vlpack.runtime.limits import too_long
from vlpack.runtime.questions import NO_VIDEOS, VIDEO_TYPES, as_messages, check_prompt
from vlpack.runtime.sampler import Sampler, choice_of
from vlpack.runtime.sampling import Sampling, check_number, sampling_of
from vlpack.runtime.stopping import StopTexts
from vlpack.system import checked_threads


class Occupancy(NamedTuple):
    """The occupancy of an engine at one moment.

    Attributes:
        slots: number of requests that it answers at a time.
        busy: number of slots in use.
        waiting: number of requests that wait for a slot.
    """

    slots: int
    busy: int
    waiting: int


class Engine:
    """A loaded package that answers many requests at once.

    Use it as a context manager, or call `close`.

    Args:
        folder: folder of a package that generates text, built for the CPU.
        slots: number of requests that are answered at a time; others wait.
        context: number of tokens of prompt and answer together that fit into a slot; by default as many as the model's
            context and half of this machine's memory allow. Unused parts of a slot take no memory.
        threads: number of threads of each session; all cores by default.
        queue: largest number of requests that wait for a slot.
        stall: largest factor by which the average time per token of running answers may grow while prompts of other
            requests are processed; at least 2. With infinity, prompts come first, which gives the highest throughput.
        speculation: whether next tokens are drafted: the tokens that followed the last ones earlier, in the prompt or
            in the answer, are checked several at a time by one step. Answers stay the same. By default on if the
            package and onnxruntime allow it.
        min_pixels: smallest area of an image in pixels, instead of the package's.
        max_pixels: largest area of an image in pixels, instead of the package's; smaller is faster.

    Attributes:
        cache_bytes: size of the keys, values and states of all slots.
        speculation: whether next tokens are drafted.

    Raises:
        OptionError: an option does not fit the package, or the cache does not fit into memory.
        PackageError: the folder is not a complete package, onnxruntime cannot load it, or it is for another provider.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        slots: int = 4,
        context: int | None = None,
        threads: int | None = None,
        queue: int = 256,
        stall: float = 4.0,
        speculation: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        check_number("slots", slots, 1, 1024, whole=True)
        check_number("queue", queue, 1, 2**31 - 1, whole=True)
        check_number("stall", stall, 2, math.inf)
        threads = checked_threads(threads)
        self.folder = Path(os.path.expanduser(folder))
        files = open_package(self.folder)
        graphs = graph_files(self.folder, files.manifest)
        config = read_config(self.folder, files.manifest["files"], graphs)
        self._model: dict[str, Any] = config["model"]
        _check_runnable(self.folder, files.manifest, config)
        longest = int(self._model["context_length"])
        check_number("context", context, 2, longest, whole=True)
        check_pixel_limits(self.folder, "image_token_id" in self._model, min_pixels, max_pixels)
        self.prompts = PromptBuilder.from_folder(
            SettingsFolder(self.folder, files.manifest["files"]),
            image_token_id=self._model.get("image_token_id"),
            video_token_id=self._model.get("video_token_id"),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            no_videos=None if self._model.get("type") in VIDEO_TYPES else NO_VIDEOS,
        )
        if "image_token_id" in self._model:
            check_vision_start(self.prompts.tokenizer, self._model.get("vision_start_token_id"))
        self._search: dict[str, Any] = config.get("search", {})
        self._ends = eos_ids(config)
        warn_of_saturation(files.manifest)
        self.vision = vision_encoder(files, self._model, threads, None)
        if "vision" in self._model and self.vision is None:
            raise PackageError(f"{self.folder}: the engine cannot use this vision graph.", "Build the package again.")
        self._graphs = Graphs(self.folder, self._model, threads)
        files.check()  # raises an error if a file was replaced while the package was loaded
        if speculation and not self._graphs.rewinds:
            raise OptionError(
                f"{option('speculation')} is on, but steps of this package cannot check several tokens of an answer: "
                "that takes onnxruntime 1.32, keys and values in full precision, and no layers with linear attention.",
                f"Leave {option('speculation')} out.",
            )
        self.speculation = self._graphs.rewinds if speculation is None else speculation
        beside = sum(int(entry["bytes"]) for entry in files.manifest["files"].values())
        self.context = context or default_context(self._graphs, slots, longest)
        self._slots = Slots(self._graphs, slots, self.context, beside)
        self.cache_bytes = self._slots.bytes
        self._grammars = Grammars(self.folder / "tokenizer.json", self._graphs.vocab_size, self._ends)
        self._building = threading.Lock()
        see = self.vision.features if self.vision is not None else None
        self._scheduler = Scheduler(self._graphs, self._slots, FairQueue(queue), see, stall)
        self._closed = weakref.finalize(self, self._scheduler.close)

    @property
    def counters(self) -> Counters:
        """Counts of what the engine has computed since it was made."""
        return self._scheduler.counters

    @property
    def occupancy(self) -> Occupancy:
        """How busy the engine is now."""
        return Occupancy(len(self._slots), len(self._slots) - self._slots.free, self._scheduler.waiting)

    @property
    def stopped(self) -> bool:
        """Whether the engine was closed or has failed, so that it answers no request any more."""
        return self._scheduler.stopped

    def close(self) -> None:
        """Interrupts all requests and ends the engine's threads."""
        self._closed()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prompt(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> Prompt:
        """Turns messages into a prompt of tensors, which `submit` accepts; arguments as for `vlpack.Model.prompt`."""
        check_sources(images, videos)
        with self._building:  # processors and templates may not be safe to call from two threads
            return self.prompts(as_messages(messages, images, videos), images, videos, **options)

    def submit(
        self,
        messages: str | Sequence[Message] | Prompt,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> Handle:
        """Submits a request, from any thread, and returns a handle through which its answer arrives.

        Images and text are turned into tensors before this method returns. In an event loop, use ``await
        asyncio.to_thread(engine.submit, …)`` so that this work does not block the loop.

        Args:
            messages: question, conversation in OpenAI's format, or prompt that `prompt` returned.
            images: images of the prompt, as in `vlpack.Model.stream`.
            videos: videos of the prompt, as in `vlpack.Model.stream`.
            **options: options of `submit_n`.

        Raises:
            InputError: the messages or images are not usable, or do not fit into a slot.
            OptionError: an option is out of its range.
            QueueFullError: too many requests wait.
        """
        return self.submit_n(1, messages, images, videos, **options)[0]

    def submit_n(
        self,
        n: int,
        messages: str | Sequence[Message] | Prompt,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        video_options: VideoOptions | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        logprobs: int | None = None,
        schema: Mapping[str, Any] | bool | type | None = None,
        regex: str | None = None,
        lark: str | None = None,
        choices: Sequence[str] | None = None,
        client: object = None,
        wait: bool = False,
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
    ) -> list[Handle]:
        """Submits a request for n answers to the same prompt, which is processed only once.

        Args:
            n: number of answers.
            messages: prompt, as in `submit`.
            images: images of the prompt, as in `submit`.
            videos: videos of the prompt, as in `submit`.
            video_options: sampling of frames for videos whose message parts have no options of their own.
            max_tokens: largest number of tokens of an answer; fewer if the slot has no room for them.
            sampling: sampling parameters; instead, temperature, top_k, top_p, repetition_penalty and seed can be given.
            temperature: divisor of the logits; 0 always chooses the likeliest token.
            top_k: number of the likeliest tokens to choose from.
            top_p: probability that the likeliest tokens to choose from have together.
            min_p: smallest probability of a token to choose from, as a share of the likeliest token's.
            repetition_penalty: factor that makes tokens of the prompt and the answer less likely if it is above 1.
            presence_penalty: amount subtracted from the logits of tokens that the answer contains.
            frequency_penalty: amount subtracted from the logit of a token for each time that the answer contains it.
            seed: seed of the random choice; the same seed gives the same answers, whatever other requests run.
            stop: texts that end the answer and are not part of it.
            stop_token_ids: tokens that end the answer, in addition to the package's.
            logprobs: number of likely tokens to report with the log-probability of each token; None for no
                log-probabilities.
            schema: JSON schema or pydantic class that the answer, in JSON, matches; `EngineAnswer.parsed` contains
                the parsed answer.
            regex: regular expression that the whole answer matches, in the syntax of Rust's regex crate.
            lark: grammar that the answer matches, in llguidance's dialect of Lark.
            choices: texts of which the answer is one.
            client: any hashable value that identifies the client; clients take turns in the queue.
            wait: whether to wait for room in the queue if it is full.
            allow_private_urls: whether image URLs may lead to this machine or its network.
            special_tokens: meaning of special tokens written in the messages: ``control`` tokens, as in transformers,
                or plain ``text``, for messages from untrusted users.

        Raises:
            InputError: the messages or images are not usable, or do not fit into a slot.
            OptionError: an option is out of its range.
            QueueFullError: too many requests wait.
        """
        check_number("n", n, 1, 1024, whole=True)
        check_number("max_tokens", max_tokens, 1, 2**31 - 1, whole=True)
        check_number("logprobs", logprobs, 0, self._graphs.vocab_size, whole=True)
        check_sources(images, videos)
        for token in stop_token_ids:
            check_number("a token of stop_token_ids", token, 0, self._graphs.vocab_size - 1, whole=True)
        single = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        choice = choice_of(
            self._search,
            sampling_of(sampling, single),
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        StopTexts(stop)
        grammar = grammar_of(schema=schema, regex=regex, lark=lark, choices=choices)
        prompt, seconds = messages, None
        if isinstance(prompt, Prompt):
            given = {"images": len(images), "videos": len(videos), "video_options": video_options}
            given |= {"allow_private_urls": allow_private_urls, "special_tokens": special_tokens != CONTROL}
            check_prompt(prompt, given, self._model)
        else:
            started = time.perf_counter()
            prompt = self.prompt(
                prompt,
                images,
                videos,
                video_options=video_options,
                allow_private_urls=allow_private_urls,
                special_tokens=special_tokens,
            )
            seconds = time.perf_counter() - started
        room, tokens = self._room(prompt), tokens_of(prompt, self._model.get("image_token_id"))
        positions, ends = positions_of(prompt, self._model), {*self._ends, *stop_token_ids}
        requests = [
            Request(
                Handle(prompt, self),
                prompt,
                tokens,
                positions,
                Sampler(choice, tokens.ids, self._graphs.vocab_size, ends, index),
                self.prompts.tokenizer.stream(),
                StopTexts(stop),
                ends,
                min(max_tokens, room),
                None if grammar is None else self._grammars.constraint(grammar),
                logprobs,
                client,
                seconds,
                Drafter(tokens.ids, min(max_tokens, room)) if self.speculation else None,
            )
            for index in range(n)
        ]
        self._scheduler.submit(requests, wait)
        return [request.handle for request in requests]

    def generate(self, messages: str | Sequence[Message] | Prompt, *arguments: Any, **options: Any) -> EngineAnswer:
        """Submits a request and waits for its answer; arguments as for `submit`.

        If the wait is interrupted, for example by Ctrl+C, the request is cancelled.
        """
        handle = self.submit(messages, *arguments, **options)
        try:
            return handle.result()
        finally:
            handle.cancel()

    def generate_many(
        self, requests: Iterable[str | Sequence[Message] | Prompt | Mapping[str, Any]], **options: Any
    ) -> list[EngineAnswer]:
        """Answers many requests and returns the answers in their order.

        Requests are submitted little by little, as many as keep all slots busy. The first one that fails cancels the
        others.

        Args:
            requests: requests: each is either the messages or a mapping of arguments of `submit`, with ``messages``.
            **options: options of `submit` for the requests that do not contain them.

        Raises:
            InputError: a request is not usable.
            OptionError: an option is out of its range.
        """
        answers: list[EngineAnswer] = []
        running: deque[Handle] = deque()
        try:
            for request in requests:
                while len(running) >= 2 * len(self._slots):
                    answers.append(running[0].result())
                    running.popleft()
                arguments = dict(request) if isinstance(request, Mapping) else {"messages": request}
                if "messages" not in arguments:
                    raise InputError(f"Request {len(answers) + len(running)} has no messages.")
                running.append(self.submit(**{"wait": True, **options, **arguments}))
            while running:
                answers.append(running[0].result())
                running.popleft()
        finally:
            for handle in running:
                handle.cancel()
        return answers

    def _room(self, prompt: Prompt) -> int:
        """The number of tokens that are left for an answer in a slot after the prompt.

        Raises:
            InputError: the prompt does not fit into a slot.
        """
        length = prompt.input_ids.size
        if length < self.context:
            return self.context - length
        if self.context == self._model["context_length"]:
            raise too_long("The prompt", prompt, self.context - 1)  # one token is left for the answer
        raise InputError(
            f"The prompt has {length} tokens; a slot of this engine has room for {self.context}, answer included.",
            f"Shorten it, or make the engine with a larger {option('context')}.",
        )


def _check_runnable(folder: Path, manifest: dict[str, Any], config: dict[str, Any]) -> None:
    """Checks that the engine can run a package.

    Raises:
        PackageError: the package is for another provider, is only a part of a model, or has no in-place cache.
    """
    provider = manifest.get("execution_provider")
    if provider != "cpu":
        raise PackageError(
            f"{folder} is for {provider}; the engine runs packages for the CPU.",
            f"Build it with {option('execution_provider', 'cpu')}.",
        )
    model = config["model"]
    embeds = "input_ids" not in model.get("decoder", {}).get("inputs", {})
    if not {"decoder", *(("embedding", "vision") if embeds else ())} <= model.keys():
        raise PackageError(
            f"{folder} holds only a part of a model and does not run by itself.",
            f"Build it with {option('part', 'all')}.",
        )
    if not config.get("search", {}).get("past_present_share_buffer"):
        raise PackageError(
            f"{folder} cannot write keys and values in place, which the engine needs.", "Build it again."
        )
