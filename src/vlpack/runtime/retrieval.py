"""Loaded packages of embedding models and rerankers, which run on onnxruntime: onnxruntime-genai has no such models."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.errors import InputError, OptionError, PackageError, option
from vlpack.ort.saturation import warn_of_saturation
from vlpack.ort.session import kernel_session, ort, session_options
from vlpack.package.loaded_files import LoadedFiles
from vlpack.package.manifest import graph_files
from vlpack.preprocess import Prompt, PromptBuilder, Tokenizer
from vlpack.preprocess.images import check_pixel_limits
from vlpack.preprocess.literal import CONTROL, check_special_tokens
from vlpack.preprocess.mrope import mrope_positions
from vlpack.preprocess.retrieval_prompts import ChatPrompts, Input, PlainPrompts
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.runtime.limits import too_long
from vlpack.runtime.shared_batches import SharedBatches
from vlpack.system import checked_threads
from vlpack.tasks import EMBEDDING, RERANKER, Loaded, check_package_task

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]

BATCH_TOKENS = 4096
"""Maximum tokens of a batch, including padding: enough to keep all cores busy with little memory."""
WINDOW_PROMPTS, WINDOW_BYTES = 512, 1 << 28
"""Maximum prompts, and bytes of their pixels, that are kept at a time to be sorted by length."""

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "webgpu": ("WebGpuExecutionProvider", "a build of onnxruntime with webgpu"),
}


def prompt_form(
    settings: Path | SettingsFolder,
    form: str,
    image: Mapping[str, int] | None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> PlainPrompts | ChatPrompts:
    """The form in which a model's inputs become prompts.

    Args:
        settings: a package's folder.
        form: ``plain`` or ``chat``, as the manifest says.
        image: the manifest's settings of images; None where the model takes none.
        min_pixels: smallest image area instead of these.
        max_pixels: largest image area instead of these.
    """
    if form == "plain":
        return PlainPrompts(Tokenizer.from_folder(settings))
    image = image or {}
    builder = PromptBuilder.from_folder(
        settings,
        image_token_id=image.get("image_token_id"),
        video_token_id=image.get("video_token_id"),
        min_pixels=image.get("min_pixels") if min_pixels is None else min_pixels,
        max_pixels=image.get("max_pixels") if max_pixels is None else max_pixels,
        no_videos="Embedding models and rerankers take no videos.",
    )
    return ChatPrompts(builder)


class Encoder(Loaded):
    """Base class of `Embedder` and `Reranker`: loads the graphs, and runs prompts through them in batches.

    Any number of threads may call it at the same time; their prompts share batches.

    Args:
        folder: folder of the package.
        threads: number of threads of the runtime; None for all cores.
        min_pixels: smallest image area in square pixels; None for the model's.
        max_pixels: largest image area in square pixels; None for the model's. Smaller is faster.

    Raises:
        OptionError: an option is out of range or has no effect on the package.
        PackageError: the folder is not a complete package for this task, or onnxruntime cannot load it.
    """

    task: str
    item: str
    """Name of an input in error messages."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.folder = Path(os.path.expanduser(folder))
        threads = checked_threads(threads)
        started = time.perf_counter()
        files = LoadedFiles(self.folder)
        self.manifest = files.manifest
        check_package_task(self.folder, self.manifest, self.task)
        section = self._checked_section()
        self.prompts: dict[str, str] = section["prompts"]
        self.max_length: int = section["max_length"]
        self.hidden_size: int = section["hidden_size"]
        self.image: dict[str, int] | None = section.get("image")
        check_pixel_limits(self.folder, self.image is not None, min_pixels, max_pixels)
        self.default_prompt: str | None = section["default_prompt"]
        self.instruction: str = section["instruction"] or ""
        """The model's default instruction, used if neither the call nor a named prompt gives one."""
        settings = SettingsFolder(self.folder, self.manifest["files"])
        self._form = prompt_form(settings, section["form"], self.image, min_pixels, max_pixels)
        warn_of_saturation(self.manifest)
        self._sessions = self._load_sessions(threads)
        self._making, self._shared = threading.Lock(), SharedBatches(self._batch, _batches)
        self.tokens = 0
        """Number of tokens of all prompts that were run, without padding."""
        files.check()  # raises an error if a file was replaced during loading
        self.load_seconds = time.perf_counter() - started

    def _checked_section(self) -> dict[str, Any]:
        """Reads and checks the section ``encoder`` of the manifest, which is untrusted."""
        section: Any = self.manifest.get("encoder")
        try:
            image = section.get("image")
            prompts, default = section["prompts"], section["default_prompt"]
            sound = (
                section["form"] in ("plain", "chat")
                and isinstance(section["instruction"], str | None)
                and all(isinstance(text, str) for text in prompts.values())
                and (default is None or default in prompts)
                and all(type(section[name]) is int for name in ("max_length", "hidden_size"))
                and (image is None or all(type(image[name]) is int and image[name] > 0 for name in _IMAGE))
            )
        except (AttributeError, KeyError, TypeError):
            sound = False
        if not sound:
            raise PackageError(
                f"{self.folder}: the manifest's section 'encoder' is damaged.", "Build the package again."
            )
        return dict(section)

    def _load_sessions(self, threads: int) -> dict[str, Any]:
        files = graph_files(self.folder, self.manifest)
        if "text" not in files and not {"decoder", "vision", "embedding"} <= set(files):
            raise PackageError(
                f"{self.folder} holds only {', '.join(files) or 'no part'} of a model and does not run by itself.",
                f"Build it with {option('part', 'all')} or {option('part', 'text')}.",
            )
        asked = str(self.manifest.get("execution_provider"))
        provider, wheel = _PROVIDERS.get(asked, (asked, "another build of onnxruntime"))
        if provider not in ort.get_available_providers():
            raise PackageError(
                f"The package is for {asked}, which the installed onnxruntime lacks.",
                f"Install {wheel} in place of onnxruntime, or build with {option('execution_provider', 'cpu')}.",
            )
        try:
            if provider == "CPUExecutionProvider":
                return {name: kernel_session(self.folder / file, threads) for name, file in files.items()}
            options = session_options(threads)
            return {
                name: ort.InferenceSession(str(self.folder / file), options, providers=[provider])
                for name, file in files.items()
            }
        except PackageError:
            raise
        except Exception as error:
            raise PackageError(f"onnxruntime cannot load {self.folder}: {str(error).strip()[:500]}") from None

    def _chosen(self, prompt: str | None) -> str:
        """The instruction text of a named prompt, or of the default prompt for None."""
        prompt = self.default_prompt if prompt is None else prompt
        if prompt is None:
            return self.instruction
        if prompt not in self.prompts:
            names = ", ".join(self.prompts) or "none"
            raise OptionError(f"The model has no prompt {prompt!r}.", f"Its prompts: {names}.")
        return self.prompts[prompt] or self.instruction

    def run(self, prompts: Iterable[Prompt]) -> Floats:
        """Runs prompts through the model and returns one row of output for each, in their order.

        Prompts of similar length share a batch, padded on the right, also those of several threads that call at the
        same time. The padding does not change the results.

        Raises:
            InputError: a prompt is longer than the model's context.
            PackageError: onnxruntime fails.
        """
        results: list[Floats] = []
        for window in self._windows(prompts):
            results += self._shared(window)
        return np.array(results, np.float32)

    def _batch(self, prompts: Sequence[Prompt]) -> Floats:
        """Runs one batch, as `_forward` does, with a message for what onnxruntime raises."""
        try:
            outputs = self._forward(prompts)
        except Exception as error:  # onnxruntime's error classes have no common base
            raise PackageError(f"onnxruntime failed: {str(error).strip()[:500]}") from error
        self.tokens += sum(prompt.input_ids.shape[1] for prompt in prompts)
        return outputs

    def _windows(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        window: list[Prompt] = []
        pixels = 0
        for number, prompt in enumerate(self._made(prompts), start=1):
            if prompt.input_ids.shape[1] > self.max_length:
                raise too_long(f"{self.item} {number}", prompt, self.max_length)
            window.append(prompt)
            pixels += 0 if prompt.pixel_values is None else prompt.pixel_values.nbytes
            if len(window) == WINDOW_PROMPTS or pixels >= WINDOW_BYTES:
                yield window
                window, pixels = [], 0
        if window:
            yield window

    def _made(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yields the prompts, made one at a time, because processors and templates may not be thread-safe."""
        source = iter(prompts)
        while True:
            with self._making:
                prompt = next(source, None)
            if prompt is None:
                return
            yield prompt

    def _forward(self, prompts: Sequence[Prompt]) -> Floats:
        """Runs one batch of prompts: float32 rows, one per prompt."""
        length = max(prompt.input_ids.shape[1] for prompt in prompts)
        ids = np.zeros((len(prompts), length), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            count = prompt.input_ids.shape[1]
            ids[row, :count], mask[row, :count] = prompt.input_ids[0], 1
        if "text" in self._sessions:
            return self._session("text", {"input_ids": ids, "attention_mask": mask})[0]
        embedding = {"input_ids": ids, "image_features": self._features(prompts)}
        tokens = dict(zip(self._outputs("embedding"), self._session("embedding", embedding), strict=True))
        positions = np.zeros((3, *ids.shape), np.int64)
        assert self.image is not None, "a package with a vision graph has image settings"
        for row, prompt in enumerate(prompts):
            row_ids = prompt.input_ids[0]
            positions[:, row, : len(row_ids)] = mrope_positions(
                row_ids, prompt.grids, self.image["image_token_id"], self.image["spatial_merge_size"]
            )
        return self._session("decoder", {**tokens, "attention_mask": mask, "position_ids": positions})[0]

    def _features(self, prompts: Sequence[Prompt]) -> npt.NDArray[Any]:
        """``image_features [tokens, W]`` of all images of a batch, encoded one by one because their sizes differ."""
        port = next(p for p in self._sessions["embedding"].get_inputs() if p.name == "image_features")
        dtype = np.float16 if port.type == "tensor(float16)" else np.float32
        features: list[npt.NDArray[Any]] = [np.zeros((0, port.shape[1]), dtype)]
        for prompt in prompts:
            for pixels, grid in prompt.images():
                features += self._session("vision", {"pixel_values": pixels, "image_grid_thw": grid})
        return np.concatenate(features)

    def _session(self, part: str, inputs: Arrays) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = self._sessions[part].run(None, inputs)
        return outputs

    def _outputs(self, part: str) -> list[str]:
        return [port.name for port in self._sessions[part].get_outputs()]


class Embedder(Encoder):
    """A loaded package of an embedding model, made by `vlpack.load`."""

    task, item = EMBEDDING, "Input"

    def embed(
        self,
        inputs: Sequence[Input],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
    ) -> Floats:
        """Embeds inputs as unit vectors, float32 ``[n, H]``; their dot products are cosine similarities.

        Args:
            inputs: texts, or dictionaries with ``text``, ``image`` (a file, URL, PIL image or array, or a list of
                these) and ``instruction``.
            instruction: task for which the inputs are compared. For retrieval, give one for queries and none for
                documents.
            prompt: name of one of the model's own prompts, such as ``query``, in place of an instruction.
            dimensions: number of leading dimensions to keep, for models that were trained for it; None for all.
            allow_private_urls: whether image URLs may lead to this machine or its private network.
            special_tokens: what special tokens written in a text become: ``control`` tokens, as in transformers,
                or plain ``text``, for texts from untrusted people.

        Raises:
            InputError: an input cannot be used or is longer than the model's context; it is named by number, from 1.
            OptionError: an option is out of range, or instruction and prompt are both given.
        """
        _check_one(instruction, prompt)
        size = self.hidden_size
        if dimensions is not None and not (type(dimensions) is int and 1 <= dimensions <= size):
            raise OptionError(f"{option('dimensions')} is {dimensions!r}; it must be a whole number from 1 to {size}.")
        _check_list(inputs, "inputs")
        check_special_tokens(special_tokens)
        prefix = self._chosen(prompt)
        options: dict[str, Any] = {"allow_private_urls": allow_private_urls, "special_tokens": special_tokens}
        rows = self.run(
            self._form.embedding(item, instruction, prefix, f"Input {number}", **options)
            for number, item in enumerate(inputs, start=1)
        ).reshape(len(inputs), size)
        if dimensions is None:
            return rows
        rows = rows[:, :dimensions]
        short: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
        return short

    def prompt(self, item: Input) -> Prompt:
        """The prompt that `embed` makes from an input without an instruction, for `run`."""
        return self._form.embedding(item, None, self._chosen(None), "The input")


class Reranker(Encoder):
    """A loaded package of a reranker, made by `vlpack.load`."""

    task, item = RERANKER, "Document"

    def score(
        self,
        query: Input,
        documents: Sequence[Input],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
    ) -> list[float]:
        """Scores how well each document answers a query: the probability, 0 to 1, of "yes" rather than "no".

        Args:
            query: text, or dictionary with ``text`` and ``image``.
            documents: texts, or dictionaries with ``text`` and ``image``.
            instruction: description of what makes a document relevant.
            prompt: name of one of the model's own prompts, in place of an instruction.
            allow_private_urls: whether image URLs may lead to this machine or its private network.
            special_tokens: what special tokens written in a text become: ``control`` tokens, as in transformers,
                or plain ``text``, for texts from untrusted people.

        Raises:
            InputError: the query or a document cannot be used, or they are too long together; documents are named by
                number, from 1.
            OptionError: the model has no such prompt, or instruction and prompt are both given.
        """
        _check_one(instruction, prompt)
        _check_list(documents, "documents")
        check_special_tokens(special_tokens)
        told = self._chosen(prompt) if instruction is None else instruction
        options: dict[str, Any] = {"allow_private_urls": allow_private_urls, "special_tokens": special_tokens}
        scores = self.run(
            self._form.reranker(query, document, told, f"Document {number}", **options)
            for number, document in enumerate(documents, start=1)
        )
        return [float(score) for score in scores]

    def prompt(self, query: Input, document: Input) -> Prompt:
        """The prompt that `score` makes from a query and a document without an instruction, for `run`."""
        return self._form.reranker(query, document, self._chosen(None), "The document")


_IMAGE = ("image_token_id", "video_token_id", "spatial_merge_size", "min_pixels", "max_pixels")


def _check_one(instruction: str | None, prompt: str | None) -> None:
    if instruction is not None and prompt is not None:
        raise OptionError(f"{option('instruction')} and {option('prompt')} are both given.", "Give only one of them.")


def _check_list(items: object, name: str) -> None:
    if isinstance(items, (str, bytes, dict)) or not isinstance(items, Sequence):
        raise InputError(
            f"{name} must be a list, even for a single one, not a {type(items).__name__}.", "Write [text]."
        )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups prompts of similar length into batches: indices by decreasing length.

    The first one of a batch is its longest; a batch has at most `BATCH_TOKENS` tokens with padding, or one prompt.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
