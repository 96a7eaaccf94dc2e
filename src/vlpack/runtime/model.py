"""A loaded package that generates text with the stock onnxruntime-genai."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlpack.decoding.graphs import Graphs
from vlpack.errors import OptionError, option
from vlpack.ort.saturation import warn_of_saturation
from vlpack.package.genai import eos_ids, keeps_states
from vlpack.package.manifest import graph_files
from vlpack.preprocess import ImageSource, Message, Prompt, PromptBuilder, VideoOptions, VideoSource
from vlpack.preprocess.images import check_pixel_limits
from vlpack.preprocess.literal import CONTROL
from vlpack.preprocess.messages import check_sources
from vlpack.preprocess.prompt_builder import check_vision_start
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.runtime.answer import Answer, AnswerStream, Begun
from vlpack.runtime.chat import Chat
from vlpack.runtime.genai import og
from vlpack.runtime.genai_model import SIZES, load_model, make_generator, open_package, read_config, vision_encoder
from vlpack.runtime.kept_states import KeptConversation
from vlpack.runtime.limits import too_long
from vlpack.runtime.questions import NO_VIDEOS, VIDEO_TYPES, as_messages, check_prompt
from vlpack.runtime.sampling import Sampling, check_number, sampling_of
from vlpack.runtime.stage_clock import StageClock
from vlpack.runtime.stopping import StopTexts
from vlpack.system import checked_threads, total_memory_bytes
from vlpack.tasks import GENERATE, Loaded


class Model(Loaded):
    """A loaded package that generates text, made by `vlpack.load`.

    Args:
        folder: folder of the package.
        threads: number of threads of the runtime; None for all cores (the runtime's own default is half of them).
        min_pixels: smallest image area in square pixels; None for the package's.
        max_pixels: largest image area in square pixels; None for the package's. Smaller is faster. Videos have limits
            of their own, in `VideoOptions`.
        vision_provider: where images are encoded. ``cpu``, the default for packages for the CPU: by vlpack in its own
            session, which is loaded with the first image and keeps the features of recent images. ``runtime``: by
            onnxruntime-genai, loaded with the package, as when it is used from other languages.
        lazy: whether onnxruntime-genai loads the package only when it is needed for an answer or a conversation.
            Conversations with models with linear attention do not need it.

    Attributes:
        prompts: builder of prompts from messages.
        vision: vision encoder in vlpack's own session; None if there is none.
        load_seconds: seconds spent on loading the package so far.

    Raises:
        OptionError: an option is out of range or has no effect on the package.
        PackageError: the folder is not a complete package, or the runtime cannot load it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        vision_provider: str | None = None,
        lazy: bool = False,
    ) -> None:
        self.folder, self.task = Path(os.path.expanduser(folder)), GENERATE
        threads = self._threads = checked_threads(threads)
        started = time.perf_counter()
        files = self._files = open_package(self.folder)
        self.manifest = files.manifest
        graphs = graph_files(self.folder, self.manifest)  # also checks which weight files the graphs name
        self.config = read_config(self.folder, self.manifest["files"], graphs)
        model = self.config["model"]
        self.context_length: int = model["context_length"]
        self.vocab_size: int = model["vocab_size"]
        check_pixel_limits(self.folder, "image_token_id" in model, min_pixels, max_pixels)
        self.prompts = PromptBuilder.from_folder(
            SettingsFolder(self.folder, self.manifest["files"]),
            image_token_id=model.get("image_token_id"),
            video_token_id=model.get("video_token_id"),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            no_videos=None if model.get("type") in VIDEO_TYPES else NO_VIDEOS,
        )
        self.tokenizer = self.prompts.tokenizer
        if "image_token_id" in model:
            check_vision_start(self.tokenizer, model.get("vision_start_token_id"))
        chunk_size = self.config.get("search", {}).get("chunk_size")
        self._chunk = {"chunk_size": chunk_size} if type(chunk_size) is int and chunk_size > 0 else {}
        warn_of_saturation(self.manifest)
        self.vision = vision_encoder(files, model, threads, vision_provider)
        self._runtime: og.Model | None = None
        self._graphs: Graphs | None = None
        self.load_seconds = time.perf_counter() - started
        if lazy:
            files.check()  # nothing was replaced while it was loaded
        else:
            self._load_runtime()

    @property
    def takes_videos(self) -> bool:
        """Whether the model takes videos."""
        return self.prompts.video_processor is not None

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a state (linear attention), so that a generator cannot go back to earlier tokens."""
        return keeps_states(self.config)

    def _load_runtime(self) -> og.Model:
        """The package in onnxruntime-genai, which is loaded if it was not loaded before.

        Raises:
            PackageError: the runtime cannot load it, or its files were replaced.
        """
        if self._runtime is None:
            started = time.perf_counter()
            provider = self.manifest.get("execution_provider")
            loaded = load_model(self.folder, self.config["model"], self._threads, provider, self.vision)
            self._files.check()  # nothing was replaced while it was loaded
            self._runtime = loaded
            self.load_seconds += time.perf_counter() - started
        return self._runtime

    def kept_conversation(self, context: int) -> KeptConversation | None:
        """A decoder for a conversation, which copies states; None if the runtime can take its cache back itself.

        The runtime's copy of the weights is freed, and loaded again if the model generates without a conversation.

        Args:
            context: largest number of tokens of the conversation.

        Raises:
            PackageError: onnxruntime cannot load the package, or its files were replaced.
        """
        model = self.config["model"]
        on_cpu = self.manifest.get("execution_provider") == "cpu" and ("vision" not in model or self.vision is not None)
        if not self.keeps_states or not on_cpu:
            return None
        if self._graphs is None:
            self._runtime = None
            started = time.perf_counter()
            self._files.check()
            graphs = Graphs(self.folder, model, self._threads, several=False)
            self._files.check()
            self._graphs = graphs
            self.load_seconds += time.perf_counter() - started
        see = None if self.vision is None else self.vision.features
        return KeptConversation(self._graphs, model, see, eos_ids(self.config), context)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the key/value cache for a number of tokens; the runtime allocates it before it generates."""
        decoder = self.config["model"]["decoder"]
        sizes = [int(decoder[name]) for name in SIZES]
        if self.keeps_states:  # only some layers have keys and values
            ports = (name for part in self.manifest["parts"].values() for name in part.get("inputs", ()))
            sizes[0] = sum(name.endswith(".key") for name in ports)
        dtype = self.manifest.get("cache", self.manifest.get("activations"))
        return 2 * math.prod(sizes) * tokens * (1 if dtype == "int8" else 2 if dtype == "float16" else 4)

    def prompt(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> Prompt:
        """Makes the prompt of a conversation, for `generate` and `stream`.

        Args:
            messages: question, or conversation in OpenAI's format.
            images: images for the image parts without a source; with a question they precede it.
            videos: videos for the video parts without a source; with a question they stand between images and question.
            **options: ``video_options``, ``allow_private_urls``, ``special_tokens``, and variables of the chat template
                such as ``tools`` and ``enable_thinking``, as `vlpack.preprocess.PromptBuilder` takes them.
        """
        check_sources(images, videos)
        return self.prompts(as_messages(messages, images, videos), images, videos, **options)

    def generate(
        self,
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
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
        timing: bool = False,
    ) -> Answer:
        """Generates an answer and returns it when it is complete; the arguments are those of `stream`."""
        stream = self.stream(
            messages,
            images,
            videos,
            video_options=video_options,
            max_tokens=max_tokens,
            sampling=sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            allow_private_urls=allow_private_urls,
            special_tokens=special_tokens,
            timing=timing,
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
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
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
        timing: bool = False,
    ) -> AnswerStream:
        """Generates an answer and returns it as a stream of text.

        Args:
            messages: question, conversation in OpenAI's format, or prompt made by `prompt`.
            images: images for the image parts without a source, as paths, URLs, bytes, PIL images or arrays; with a
                question given as a string they precede it.
            videos: videos for the video parts without a source, as files, folders of images or lists of frames; with a
                question given as a string they stand between images and question.
            video_options: frame and size options for videos whose message parts have none.
            max_tokens: maximum number of tokens of the answer.
            sampling: how the next token is chosen, in place of temperature, top_k, top_p, repetition_penalty and seed.
            temperature: randomness of the choice; 0 always takes the most likely token.
            top_k: number of most likely tokens to choose from.
            top_p: share of the probability, from 0 to 1, that the most likely tokens to choose from have together.
            repetition_penalty: factor above 1 that makes tokens that have occurred less likely.
            seed: seed of the random numbers; the same seed gives the same answer.
            stop: texts at which the answer ends; the text of the answer does not include them.
            allow_private_urls: whether image URLs may lead to this machine or its private network.
            special_tokens: what special tokens written in the messages become: ``control`` tokens, as in transformers,
                or plain ``text``, for messages from untrusted people.
            timing: whether to measure vision and prefill separately when the runtime encodes the images. This uses the
                runtime's log callback, of which a process has only one, and removes it afterwards.

        Raises:
            InputError: the messages or images cannot be used, or do not fit the model's context.
            OptionError: an option is out of range.
        """
        check_number("max_tokens", max_tokens, 1, 2**31 - 1, whole=True)
        check_sources(images, videos)
        options = self.search_options(
            sampling_of(sampling, Sampling(temperature, top_k, top_p, repetition_penalty, seed))
        )
        stops = StopTexts(stop)
        prompt, preprocess_seconds = messages, None
        if isinstance(prompt, Prompt):
            given = {"images": len(images), "videos": len(videos), "video_options": video_options}
            given |= {"allow_private_urls": allow_private_urls, "special_tokens": special_tokens != CONTROL}
            check_prompt(prompt, given, self.config["model"])
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
            preprocess_seconds = time.perf_counter() - started
        limit = self.room(prompt, max_tokens)

        def begin() -> Begun:
            return self.begin(prompt, {**options, "max_length": limit}, timing)

        text, ends = self.tokenizer.stream(), eos_ids(self.config)
        return AnswerStream(prompt, begin, text, ends, max_tokens, preprocess_seconds, stop=stops)

    def chat(
        self,
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
    ) -> Chat:
        """Starts a conversation, in which unchanged turns are not computed again; the arguments are those of `Chat`."""
        return Chat(
            self,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            video_options=video_options,
            context=context,
            allow_private_urls=allow_private_urls,
            messages=messages,
            special_tokens=special_tokens,
            **variables,
        )

    def search_options(self, sampling: Sampling | None) -> dict[str, Any]:
        """Translates sampling settings into search options of the runtime, and adds the package's chunk size.

        Raises:
            OptionError: a value is out of range.
        """
        if sampling is not None and not isinstance(sampling, Sampling):
            raise OptionError("sampling must be a vlpack.Sampling.", "For example vlpack.Sampling(temperature=0).")
        options = {**self._chunk, **(sampling or Sampling()).search_options()}
        if "top_k" in options:  # the runtime refuses to take more tokens than there are
            options["top_k"] = min(options["top_k"], self.vocab_size)
        return options

    def room(self, prompt: Prompt, max_tokens: int) -> int:
        """Number of tokens for which the cache is allocated: the prompt and the answer, limited by the context.

        Raises:
            InputError: the prompt does not fit the context.
            OptionError: the cache does not fit this machine's memory.
        """
        length = prompt.input_ids.size
        if length >= self.context_length:
            raise too_long("The prompt", prompt, self.context_length - 1)  # one token is for the answer
        limit = min(length + max_tokens, self.context_length)
        needed, there = self.cache_bytes(limit), total_memory_bytes()
        if there and needed > there:
            raise OptionError(
                f"The cache for {limit} tokens (prompt and {option('max_tokens')}) takes {needed / 1e9:.1f} GB; "
                f"this machine has {there / 1e9:.1f} GB.",
                f"Give a smaller {option('max_tokens')}.",
            )
        return limit

    def begin(self, prompt: Prompt, options: dict[str, Any], timing: bool = False) -> Begun:
        """Creates a generator, which processes a prompt and generates the first token of the answer.

        Args:
            prompt: prompt of this package.
            options: search options of the runtime, with ``max_length``.
            timing: whether to measure the encoding of images when the runtime does it.
        """
        runtime, started = self._load_runtime(), time.perf_counter()
        if self.vision is not None or not prompt.has_images:
            arrays = prompt.named_arrays() if self.vision is None else self.vision.runtime_arrays(prompt)
            seconds = time.perf_counter() - started if prompt.has_images else 0.0
            generator = make_generator(runtime, arrays, options)
            generator.generate_next_token()
            return Begun(generator, seconds)
        with StageClock(timing) as clock:
            generator = make_generator(runtime, prompt.named_arrays(), options)
            generator.generate_next_token()
        return Begun(generator, clock.seconds_until("image_features", started))
