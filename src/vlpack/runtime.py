"""A built package, loaded and generating through the stock onnxruntime-genai."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlpack.context import too_long
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.genai import og
from vlpack.loading import check_pixel_limits, checked_threads
from vlpack.memory import peak_memory_bytes, total_memory_bytes
from vlpack.package.manifest import graph_files, package_json, whole_package
from vlpack.package.outside import check_config
from vlpack.preprocess import ImageSource, Message, Prompt, PromptBuilder, VideoOptions, VideoSource
from vlpack.sampling import Sampling, check_number
from vlpack.saturation import warn_of_saturation
from vlpack.tasks import GENERATE, Loaded, check_package_task
from vlpack.timing import StageClock

RUNTIME_NEEDED = (0, 18)
"""onnxruntime-genai's first version that carries DeepStack's channel."""

NO_VIDEOS = (
    "Videos of Qwen2-VL and Qwen2.5-VL are not taken: in the runtime a video and what follows it would stand at other "
    "positions than in the model."
)
"""Why only Qwen3-VL has videos: its positions are those of single images, which the runtime computes as the model."""


@dataclass
class Stats:
    """What an answer took: seconds, tokens, bytes.

    What was not measured is None: preprocessing of a prompt that was ready, and, with images, how the time up to the
    first token divides into vision and prefill, unless ``timing`` was asked for. ``video_seconds`` is what reading and
    resizing videos took, and a part of preprocessing.
    """

    prompt_tokens: int = 0
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
    """A finished answer; ``finish_reason`` is ``stop`` (the model ended) or ``length`` (max_tokens was reached)."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats = field(default_factory=Stats)


class Model(Loaded):
    """A package that generates, in memory. Make it with `vlpack.load`.

    Args:
        folder: the package.
        threads: of the runtime; all cores by default (its own default is half of them).
        min_pixels: smallest image area, square pixels, instead of the package's.
        max_pixels: largest image area; smaller is faster. Videos have limits of their own: `VideoOptions`.

    Raises:
        PackageError: the folder is not a complete package, or the runtime cannot load it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.folder, self.task = Path(os.path.expanduser(folder)), GENERATE
        threads = checked_threads(threads)
        started = time.perf_counter()
        self.manifest = check_package(self.folder)
        graphs = graph_files(self.folder, self.manifest)  # whose weights are looked at before the runtime opens them
        self.config = _read_config(self.folder, self.manifest["files"], graphs)
        model = self.config["model"]
        self.context_length: int = model["context_length"]
        self.vocab_size: int = model["vocab_size"]
        check_pixel_limits(self.folder, "image_token_id" in model, min_pixels, max_pixels)
        self._prompts = PromptBuilder.from_folder(
            self.folder,
            image_token_id=model.get("image_token_id"),
            video_token_id=model.get("video_token_id"),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            no_videos=None if model.get("type") == "qwen3_vl" else NO_VIDEOS,
        )
        self.tokenizer = self._prompts.tokenizer
        warn_of_saturation(self.manifest)
        self._model = _load(self.folder, model, threads, self.manifest.get("execution_provider"))
        self.load_seconds = time.perf_counter() - started

    @property
    def takes_videos(self) -> bool:
        """Whether prompts may have videos."""
        return self._prompts.video_processor is not None

    def cache_bytes(self, tokens: int) -> int:
        """What the keys and values of so many tokens take: the runtime allots them before it begins."""
        decoder = self.config["model"]["decoder"]
        sizes = (int(decoder[name]) for name in _SIZES)
        return 2 * math.prod(sizes) * tokens * (2 if self.manifest.get("activations") == "float16" else 4)

    def prompt(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> Prompt:
        """Messages as the tensors that the package is run on; `generate` and `stream` take the result.

        Options are ``video_options`` and the chat template's variables (``tools``, ``enable_thinking`` …); see
        `vlpack.preprocess.PromptBuilder`.
        """
        return self._prompts(_as_messages(messages, images, videos), images, videos, **options)

    def generate(
        self,
        messages: str | Sequence[Message] | Prompt,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        video_options: VideoOptions | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        allow_private_urls: bool = False,
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
            allow_private_urls=allow_private_urls,
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
        allow_private_urls: bool = False,
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
            sampling: how tokens are chosen.
            allow_private_urls: let image URLs lead to this machine or its network.
            timing: measure vision and prefill apart. It takes the runtime's log, which is one for the process, and
                leaves it without a callback.

        Raises:
            InputError: the messages or images are not usable, or do not fit the model's context.
            OptionError: an option is out of its range.
        """
        check_number("max_tokens", max_tokens, 1, 2**31 - 1, whole=True)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise OptionError("sampling must be a vlpack.Sampling.", "vlpack.Sampling(temperature=0), for example.")
        if isinstance(images, (str, bytes, os.PathLike)):
            raise InputError("images must be a list, also for a single one.", "[image]")
        if isinstance(videos, (str, bytes, os.PathLike)):
            raise InputError("videos must be a list, also for a single one.", "[video]")
        options = (sampling or Sampling()).search_options()
        if "top_k" in options:  # the runtime refuses to take more tokens than there are
            options["top_k"] = min(options["top_k"], self.vocab_size)
        if isinstance(messages, Prompt):
            given = {"images": len(images), "videos": len(videos), "video_options": video_options}
            _check_prompt(messages, {**given, "allow_private_urls": allow_private_urls}, self.config["model"])
            return AnswerStream(self, messages, max_tokens, options, None, timing)
        started = time.perf_counter()
        prompt = self.prompt(
            messages, images, videos, video_options=video_options, allow_private_urls=allow_private_urls
        )
        return AnswerStream(self, prompt, max_tokens, options, time.perf_counter() - started, timing)


class AnswerStream(Iterator[str]):
    """Iterates over the answer's text; `answer` is complete when it ends. Leaving early frees the runtime's state."""

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        max_tokens: int,
        options: dict[str, Any],
        preprocess_seconds: float | None,
        timing: bool,
    ) -> None:
        length = prompt.input_ids.shape[1]
        video_tokens = prompt.num_video_tokens
        image_tokens = int(prompt.num_image_tokens.sum()) - video_tokens
        if length >= model.context_length:
            raise too_long("The prompt", prompt, model.context_length - 1)  # one is for the answer
        self.answer = Answer("", [], "length")
        stats = self.answer.stats
        stats.prompt_tokens, stats.image_tokens, stats.video_tokens = length, image_tokens, video_tokens
        stats.video_frames = sum(len(video.frames_indices) for video in prompt.videos)
        stats.video_seconds = sum(video.seconds for video in prompt.videos)
        stats.preprocess_seconds = preprocess_seconds
        limit = min(length + max_tokens, model.context_length)
        needed, there = model.cache_bytes(limit), total_memory_bytes()
        if there and needed > there:
            raise OptionError(
                f"The cache for {limit} tokens (prompt and max_tokens) takes {needed / 1e9:.1f} GB; this machine has "
                f"{there / 1e9:.1f} GB.",
                "Give a smaller --max-tokens.",
            )
        self._pieces = self._run(model, prompt, {**options, "max_length": limit}, timing)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except RuntimeError as error:  # onnxruntime-genai's only kind
            raise PackageError(f"The runtime failed: {str(error).strip()[:500]}") from error

    def close(self) -> None:
        """Stop, and free the runtime's state."""
        self._pieces.close()

    def _run(self, model: Model, prompt: Prompt, options: dict[str, Any], timing: bool) -> Generator[str, None, None]:
        answer, stats = self.answer, self.answer.stats
        text = model.tokenizer.stream()
        started = time.perf_counter()
        with StageClock(timing and prompt.has_images) as clock:
            generator = prefill(model._model, prompt, options)
            generator.generate_next_token()
            first = time.perf_counter()
        stats.vision_seconds = clock.seconds_until("image_features", started) if prompt.has_images else 0.0
        if stats.vision_seconds is not None:
            stats.prefill_seconds = first - started - stats.vision_seconds
        stats.first_token_seconds = (stats.preprocess_seconds or 0.0) + first - started
        ends = _eos_ids(model.config)
        while True:
            token = int(generator.get_next_tokens()[0])
            answer.tokens.append(token)
            stats.new_tokens += 1
            stats.decode_seconds = time.perf_counter() - first
            stats.peak_memory = peak_memory_bytes()
            if token in ends:
                answer.finish_reason = "stop"
                break
            if piece := text.push(token):
                answer.text += piece
                yield piece
            if generator.is_done():  # max_length is reached
                break
            generator.generate_next_token()
        if piece := text.flush():
            answer.text += piece
            yield piece


def check_package(folder: Path) -> dict[str, Any]:
    """The manifest of a whole package, which the runtime can run.

    Raises:
        PackageError: it cannot, with what is wrong.
    """
    manifest = whole_package(folder)
    check_package_task(folder, manifest, GENERATE)
    version = tuple(int(part) for part in og.__version__.split(".")[:2])
    if version < RUNTIME_NEEDED:
        needed = ".".join(map(str, RUNTIME_NEEDED))
        raise PackageError(
            f"onnxruntime-genai {og.__version__} is too old: packages need {needed} or newer.",
            f"pip install -U 'onnxruntime-genai>={needed}'",
        )
    return manifest


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


_INTEGERS = ("context_length", "vocab_size")
_SIZES = ("num_hidden_layers", "num_key_value_heads", "head_size")


def _read_config(folder: Path, files: Mapping[str, Any], graphs: Mapping[str, str]) -> dict[str, Any]:
    path = folder / "genai_config.json"
    config = package_json(folder, path.name)
    if config is None:
        raise PackageError(f"{folder} has no genai_config.json.", "Build or copy the package again.")
    check_config(path, config, files, graphs)
    try:
        model, eos = config["model"], config["model"]["eos_token_id"]
        sizes = [model[name] for name in _INTEGERS]
        if "decoder" in model:
            sizes += [model["decoder"][name] for name in _SIZES]
    except (KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} cannot be read: {error!r}.") from None
    if all(type(size) is int and 0 < size < 2**31 for size in sizes) and isinstance(eos, (int, list)):
        return config
    raise PackageError(f"{path} has a {', '.join(_INTEGERS + _SIZES)} or eos_token_id of the wrong type or size.")


def _eos_ids(config: dict[str, Any]) -> set[int]:
    eos = config["model"]["eos_token_id"]
    return set(eos) if isinstance(eos, list) else {eos}


def _load(folder: Path, model: dict[str, Any], threads: int, provider: object) -> og.Model:
    sections = [name for name in ("decoder", "vision", "embedding") if name in model]
    embeds = "inputs_embeds" in model.get("decoder", {}).get("inputs", {})
    if "decoder" not in model or (embeds and len(sections) < 3):
        raise PackageError(
            f"{folder} holds only {', '.join(sections) or 'no part'} of a model and does not run by itself.",
            "Build it with --part all, or with --part text and without exclude_embeds.",
        )
    session = {"session_options": {"intra_op_num_threads": threads}}
    many = {name: session for name in sections if name != "embedding"}  # which has one thread, as the package says
    try:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": many}))
        return og.Model(config)
    except Exception as error:
        raise PackageError(f"The runtime cannot load {folder}: {str(error).strip()[:500]}", _wheel(provider)) from None


def _wheel(provider: object) -> str | None:
    """What to do where a package is for another provider than the installed runtime may have."""
    if provider == "cpu":
        return None
    wheels = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-winml"}
    wheel = wheels.get(str(provider), f"a build of onnxruntime-genai with {provider}")
    return f"The package is for {provider}: it needs {wheel} in place of onnxruntime-genai. Or build with -e cpu."


def prefill(model: og.Model, prompt: Prompt, options: dict[str, Any]) -> og.Generator:
    """A generator that has seen the prompt."""
    params = og.GeneratorParams(model)
    params.set_search_options(**options)
    generator = og.Generator(model, params)
    if prompt.has_images:
        tensors = og.NamedTensors()
        for name, array in prompt.named_arrays().items():
            tensors[name] = array
        generator.set_inputs(tensors)
    else:
        generator.append_tokens(prompt.input_ids)
    return generator
