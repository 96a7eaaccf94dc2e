"""The temporary 8-bit package of a calibration, run in plain onnxruntime to generate texts and decoder inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.architectures import Architecture
from vlpack.ort.graph_edits import call, empty_past
from vlpack.ort.session import cpu_session, ort
from vlpack.preprocess.mrope import mrope_positions
from vlpack.preprocess.prompt import Prompt
from vlpack.system import available_cores

Array = npt.NDArray[Any]

TOGETHER = 8
"""Number of texts that are generated at the same time."""
LEAST_SHARE = 0.05
"""Threshold of min-p sampling (Nguyen et al. 2024, arXiv:2407.01082): tokens less likely than this share of the most
likely token's probability are never chosen."""


class Shown(NamedTuple):
    """The inputs of the decoder for a batch of texts or a prompt.

    Args:
        inputs: arrays by the names of the decoder's inputs, without the key/value cache.
        tokens: number of tokens in all texts of the batch.
        of_images: mask of the tokens that stand for parts of images, bool ``[tokens]``; None if there are none.
    """

    inputs: dict[str, Array]
    tokens: int
    of_images: Array | None = None


class CalibrationModel:
    """A temporary package with fp32 activations whose graphs are run for a calibration.

    Args:
        folder: folder of the package.
        files: file names of the graphs by part, such as ``decoder``.
        architecture: architecture of the model.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], architecture: Architecture) -> None:
        self.folder, self.files, self.architecture = folder, files, architecture
        self.threads = available_cores()
        self.decoder_file = files["text" if "text" in files else "decoder"]
        self._embedding: Any = None
        self._open_embedding()

    def _open_embedding(self) -> None:
        """Opens the embedding graph anew: the pages of its mapped table in which a token was looked up are memory."""
        if "embedding" in self.files:
            self._embedding = None
            self._embedding = cpu_session(self.folder / self.files["embedding"], 1)

    def show(self, ids: Array, prompt: Prompt | None = None, first: int = 0) -> Shown:
        """Decoder inputs for a batch of tokens.

        Args:
            ids: token ids ``[B, S]``.
            prompt: prompt with images, whose tokens are ``ids [1, S]``; None for texts.
            first: position of the first token.
        """
        positions: Array = np.broadcast_to(np.arange(first, first + ids.shape[1]), ids.shape).astype(np.int64)
        vision = self.architecture.vision
        if self.architecture.decoder.position_axes:
            positions = np.broadcast_to(positions, (3, *ids.shape))
        features = of_images = None
        if prompt is not None and prompt.has_images:
            assert vision is not None, "only prompts of vision-language models have pictures"
            grids, merge = prompt.grids, vision.spatial_merge_size
            positions = mrope_positions(ids[0], grids, vision.image_token_id, merge)[:, None]
            features, of_images = self._features(prompt), ids[0] == vision.image_token_id
        # the mask includes the tokens before these
        mask = np.ones((ids.shape[0], first + ids.shape[1]), np.int64)
        inputs = {**self._tokens(ids, features), "position_ids": positions, "attention_mask": mask}
        return Shown(inputs, ids.size, of_images)

    def _tokens(self, ids: Array, features: Array | None) -> dict[str, Array]:
        if self._embedding is None:
            return {"input_ids": ids}
        if features is None:
            features = np.zeros((0, self._embedding.get_inputs()[1].shape[1]), np.float32)
        return call(self._embedding, {"input_ids": ids, "image_features": features})

    def _features(self, prompt: Prompt) -> Array:
        vision = cpu_session(self.folder / self.files["vision"], self.threads)
        images = prompt.images()
        outputs = [call(vision, {"pixel_values": pixels, "image_grid_thw": grid}) for pixels, grid in images]
        return np.concatenate([output["image_features"] for output in outputs])

    def write(
        self, openings: Sequence[Sequence[int]], length: int, ends: set[int], seed: int, progress: Callable[[int], None]
    ) -> list[list[int]]:
        """Generates texts by continuing the given openings.

        Args:
            openings: first tokens of each text.
            length: largest number of tokens of a text, its opening included.
            ends: tokens that end a text.
            seed: seed of the random choice of tokens.
            progress: function that receives the number of tokens generated so far in all texts.

        Returns:
            token ids of each text, its opening included.
        """
        decoder = cpu_session(self.folder / self.decoder_file, self.threads)
        random, texts = np.random.default_rng(seed), []
        for first in range(0, len(openings), TOGETHER):
            some = openings[first : first + TOGETHER]

            def written(place: int, before: int = first, count: int = len(some)) -> None:
                progress(before * length + count * place)

            texts += self._write(decoder, some, length, ends, random, written)
            written(length)
        return texts

    def _write(
        self,
        decoder: Any,
        openings: Sequence[Sequence[int]],
        length: int,
        ends: set[int],
        random: np.random.Generator,
        progress: Callable[[int], None],
    ) -> list[list[int]]:
        # all texts take each step together: a text that is still in its opening gets the opening's next token
        texts = [[opening[0]] for opening in openings]
        over = [False] * len(texts)
        binding = decoder.io_binding()
        binding.bind_output("logits")
        states = _bind_cache(decoder, binding, len(texts), length)
        ports = {port.name for port in decoder.get_inputs()}
        for place in range(length - 1):
            shown = self.show(np.array([[text[-1]] for text in texts], np.int64), first=place)
            given = {name: np.ascontiguousarray(array) for name, array in shown.inputs.items() if name in ports}
            for name, array in given.items():
                binding.bind_cpu_input(name, array)
            decoder.run_with_iobinding(binding)
            _carry_states(binding, states)
            chosen = choose(binding.get_outputs()[0].numpy()[:, -1], random)
            for row, (text, opening) in enumerate(zip(texts, openings, strict=True)):
                given_here = place + 1 < len(opening)
                text.append(opening[place + 1] if given_here else int(chosen[row]))
                over[row] |= not given_here and text[-1] in ends
            if all(over):
                break
            if place % 16 == 15:
                self._open_embedding()
                progress(place)
        return [_until(text, len(opening), ends) for text, opening in zip(texts, openings, strict=True)]


def _until(text: list[int], start: int, ends: set[int]) -> list[int]:
    """The text up to and including its first end token at index ``start`` or later."""
    stop = next((place for place in range(start, len(text)) if text[place] in ends), len(text) - 1)
    return text[: stop + 1]


def _bind_cache(decoder: Any, binding: Any, batch: int, length: int) -> dict[str, list[Any]]:
    """Binds a key/value cache for ``length`` tokens to every layer; each step adds to it in place.

    Returns:
        the states of linear attention before and after the next step, by input; `_carry_states` exchanges them.
    """
    states = {}
    for port in decoder.get_inputs():
        if port.name.startswith("past_key_values"):
            room = ort.OrtValue.ortvalue_from_numpy(empty_past(port, batch, length))
            grows = any(isinstance(size, str) for size in port.shape[1:])
            after = room if grows else ort.OrtValue.ortvalue_from_numpy(empty_past(port, batch))
            binding.bind_ortvalue_input(port.name, room)
            binding.bind_ortvalue_output(port.name.replace("past_key_values", "present"), after)
            if not grows:
                states[port.name] = [room, after]
    return states


def _carry_states(binding: Any, states: Mapping[str, list[Any]]) -> None:
    """Makes the states after a step those before the next one."""
    for name, pair in states.items():
        pair.reverse()
        binding.bind_ortvalue_input(name, pair[0])
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), pair[1])


def choose(logits: Array, random: np.random.Generator) -> Array:
    """Samples one token for each row of ``logits [B, V]`` by min-p sampling with the threshold `LEAST_SHARE`."""
    largest = logits.max(axis=1, keepdims=True)
    likely = logits >= largest + np.float32(np.log(LEAST_SHARE))
    chosen = np.empty(len(logits), np.int64)
    for row, draw in enumerate(random.random(len(logits))):
        (tokens,) = likely[row].nonzero()
        sums = np.cumsum(np.exp(logits[row, tokens] - largest[row]), dtype=np.float64)
        chosen[row] = tokens[(sums <= draw * sums[-1]).sum()]
    return chosen
