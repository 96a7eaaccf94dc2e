"""A built package, loaded and generating through the stock onnxruntime-genai."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlpack.answers import Answer, AnswerStream, Begun
from vlpack.chat import Chat
from vlpack.context import too_long
from vlpack.cores import checked_threads
from vlpack.errors import InputError, OptionError
from vlpack.genai_model import SIZES, load_model, make_generator, open_package, read_config, vision_encoder
from vlpack.memory import total_memory_bytes
from vlpack.package.genai_config import eos_ids
from vlpack.package.manifest import graph_files
from vlpack.preprocess import ImageSource, Message, Prompt, PromptBuilder, VideoOptions, VideoSource
from vlpack.preprocess.images import check_pixel_limits
from vlpack.preprocess.literal import CONTROL
from vlpack.preprocess.messages import check_sources
from vlpack.preprocess.prompt import check_vision_start
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.sampling import Sampling, check_number, sampling_of
from vlpack.saturation import warn_of_saturation
from vlpack.stopping import StopTexts
from vlpack.tasks import GENERATE, Loaded
from vlpack.timing import StageClock

NO_VIDEOS = (
    "Videos of Qwen2-VL and Qwen2.5-VL are not taken: in the runtime a video and what follows it would stand at other "
    "positions than in the model."
)
"""Why only Qwen3-VL has videos: its positions are those of single images, which the runtime computes as the model."""


class Model(Loaded):
    """A package that generates, in memory. Make it with `vlpack.load`.

    Args:
        folder: the package.
        threads: of the runtime; all cores by default (its own default is half of them).
        min_pixels: smallest image area, square pixels, instead of the package's.
        max_pixels: largest image area; smaller is faster. Videos have limits of their own: `VideoOptions`.
        vision_provider: where images are looked at. ``cpu``, the default of packages for the CPU: in a session of
            vlpack's own, which is loaded with the first image and keeps what it made of the last ones. ``runtime``: in
            onnxruntime-genai, loaded with the package, as other languages have it.

    Attributes:
        prompts: makes prompts of messages.
        vision: that session's encoder; None where there is none.

    Raises:
        OptionError: an option does not suit the package.
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
    ) -> None:
        self.folder, self.task = Path(os.path.expanduser(folder)), GENERATE
        threads = checked_threads(threads)
        started = time.perf_counter()
        files = open_package(self.folder)
        self.manifest = files.manifest
        graphs = graph_files(self.folder, self.manifest)  # whose weights are looked at before the runtime opens them
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
            no_videos=None if model.get("type") == "qwen3_vl" else NO_VIDEOS,
        )
        self.tokenizer = self.prompts.tokenizer
        if "image_token_id" in model:
            check_vision_start(self.tokenizer, model.get("vision_start_token_id"))
        chunk_size = self.config.get("search", {}).get("chunk_size")
        self._chunk = {"chunk_size": chunk_size} if type(chunk_size) is int and chunk_size > 0 else {}
        warn_of_saturation(self.manifest)
        self.vision = vision_encoder(files, model, threads, vision_provider)
        self._model = load_model(self.folder, model, threads, self.manifest.get("execution_provider"), self.vision)
        files.check()  # nothing was replaced while it was loaded
        self.load_seconds = time.perf_counter() - started

    @property
    def takes_videos(self) -> bool:
        """Whether prompts may have videos."""
        return self.prompts.video_processor is not None

    def cache_bytes(self, tokens: int) -> int:
        """What the keys and values of so many tokens take: the runtime allots them before it begins."""
        decoder = self.config["model"]["decoder"]
        sizes = (int(decoder[name]) for name in SIZES)
        dtype = self.manifest.get("cache", self.manifest.get("activations"))
        return 2 * math.prod(sizes) * tokens * (1 if dtype == "int8" else 2 if dtype == "float16" else 4)

    def prompt(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> Prompt:
        """Messages as the tensors that the package is run on; `generate` and `stream` take the result.

        Options are ``video_options``, ``special_tokens`` and the chat template's variables (``tools``,
        ``enable_thinking`` …); see `vlpack.preprocess.PromptBuilder`.
        """
        check_sources(images, videos)
        return self.prompts(_as_messages(messages, images, videos), images, videos, **options)

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
        """The whole answer; arguments as for `stream`."""
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
        """The answer as it is made, piece by piece.

        Args:
            messages: a question, a conversation in OpenAI's form, or a prompt that `prompt` made of them.
            images: file names, URLs, bytes, PIL images or arrays for the image parts that name none; with a question
                given as a string they go before it.
            videos: likewise for the video parts: files, folders of pictures, or lists of frames; with a question given
                as a string they go between images and question.
            video_options: how videos are looked at whose parts do not say it themselves.
            max_tokens: of the answer at most.
            sampling: how tokens are chosen; or, in its place, what it would hold: temperature, top_k, top_p,
                repetition_penalty and seed.
            temperature: 0 takes the likeliest token always.
            top_k: only the k likeliest.
            top_p: only the likeliest whose probabilities sum to p.
            repetition_penalty: above 1 makes tokens that have occurred less likely.
            seed: the same seed gives the same answer.
            stop: texts at which the answer ends; it does not have them.
            allow_private_urls: let image URLs lead to this machine or its network.
            special_tokens: what special tokens written in the messages become: ``control`` tokens, as in transformers,
                or ``text``, for messages that come from strangers.
            timing: measure vision and prefill apart. It takes the runtime's log, which is one for the process, and
                leaves it without a callback.

        Raises:
            InputError: the messages or images are not usable, or do not fit the model's context.
            OptionError: an option is out of its range.
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
            _check_prompt(prompt, given, self.config["model"])
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
        """A conversation, whose unchanged turns are not computed again; arguments as for `vlpack.chat.Chat`."""
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
        """How tokens are chosen, as the runtime takes it.

        Raises:
            OptionError: a value is out of its range.
        """
        if sampling is not None and not isinstance(sampling, Sampling):
            raise OptionError("sampling must be a vlpack.Sampling.", "vlpack.Sampling(temperature=0), for example.")
        options = {**self._chunk, **(sampling or Sampling()).search_options()}
        if "top_k" in options:  # the runtime refuses to take more tokens than there are
            options["top_k"] = min(options["top_k"], self.vocab_size)
        return options

    def room(self, prompt: Prompt, max_tokens: int) -> int:
        """The tokens that the cache is made for: of the prompt, and of the answer as far as the context has room.

        Raises:
            InputError: the prompt does not fit the context.
            OptionError: the cache does not fit this machine's memory.
        """
        length = prompt.input_ids.size
        if length >= self.context_length:
            raise too_long("The prompt", prompt, self.context_length - 1)  # one is for the answer
        limit = min(length + max_tokens, self.context_length)
        needed, there = self.cache_bytes(limit), total_memory_bytes()
        if there and needed > there:
            raise OptionError(
                f"The cache for {limit} tokens (prompt and max_tokens) takes {needed / 1e9:.1f} GB; this machine has "
                f"{there / 1e9:.1f} GB.",
                "Give a smaller --max-tokens.",
            )
        return limit

    def begin(self, prompt: Prompt, options: dict[str, Any], timing: bool = False) -> Begun:
        """A generator that has seen the prompt, and the first token.

        Args:
            prompt: of this package.
            options: of the search, with max_length.
            timing: measure what looking at images takes, where the runtime does it.
        """
        started = time.perf_counter()
        if self.vision is not None or not prompt.has_images:
            arrays = prompt.named_arrays() if self.vision is None else self.vision.runtime_arrays(prompt)
            seconds = time.perf_counter() - started if prompt.has_images else 0.0
            generator = make_generator(self._model, arrays, options)
            generator.generate_next_token()
            return Begun(generator, seconds)
        with StageClock(timing) as clock:
            generator = make_generator(self._model, prompt.named_arrays(), options)
            generator.generate_next_token()
        return Begun(generator, clock.seconds_until("image_features", started))


def _as_messages(
    messages: str | Sequence[Message], images: Sequence[ImageSource], videos: Sequence[VideoSource]
) -> Sequence[Message]:
    if not isinstance(messages, str):
        return messages
    parts = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    if not parts:  # text models' templates know no parts
        return [{"role": "user", "content": messages}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": messages}]}]


def _check_prompt(prompt: Prompt, given: dict[str, Any], model: dict[str, Any]) -> None:
    """A ready prompt comes without what only its making could use, and from a package like this."""
    for what, value in given.items():
        if value:
            raise InputError(f"The prompt is ready, so {what} would have no effect.", f"Give {what} to model.prompt.")
    if prompt.has_images and "vision" not in model:
        raise InputError("The prompt has images, and the package has no vision part.", "Send text only.")
    if prompt.videos and model.get("type") != "qwen3_vl":
        raise InputError(NO_VIDEOS, "Send single images.")
    if prompt.input_ids.max(initial=0) >= model["vocab_size"]:
        raise InputError("The prompt has tokens that the package does not know.", "Make it with this model's prompt.")
