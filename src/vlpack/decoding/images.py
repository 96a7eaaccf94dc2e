"""A prompt's positions and images as inputs of the decoder: positions of all tokens, and features of placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.decoding.prefixes import Tokens
from vlpack.preprocess import Prompt
from vlpack.preprocess.mrope import mrope_positions


def positions_of(prompt: Prompt, model: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """The M-RoPE positions of a prompt's tokens (time, height, width), int64 ``[3, S]``.

    Args:
        prompt: the prompt.
        model: ``model`` section of the package's genai_config.json.
    """
    ids = prompt.input_ids[0]
    if not prompt.has_images:
        return np.tile(np.arange(len(ids)), (3, 1))
    merge = int(model["vision"]["spatial_merge_size"])
    return mrope_positions(ids, prompt.grids, int(model["image_token_id"]), merge)


class Unseen:
    """The images of a prompt with placeholders that the decoder has not computed yet.

    Args:
        prompt: a prompt with images.
        tokens: its tokens, with the positions of its images.
        known: number of the prompt's first tokens that need not be computed.

    Attributes:
        prompt: the prompt with only these images; None if there are none.
    """

    def __init__(self, prompt: Prompt, tokens: Tokens, known: int) -> None:
        assert prompt.pixel_values is not None, "the prompt has images"
        self._starts = np.array([image.start for image in tokens.images])
        self._counts = np.asarray(prompt.num_image_tokens)
        first = int(np.searchsorted(self._starts + self._counts, known, side="right"))
        self._before = int(self._counts[:first].sum())  # placeholders of the other images
        patches = int(prompt.grids[:first].prod(axis=1).sum())
        self.prompt: Prompt | None = None
        if first < len(self._starts):
            pixels, grids = prompt.pixel_values[patches:], prompt.grids[first:]
            self.prompt = replace(prompt, pixel_values=pixels, image_grid_thw=grids)

    def within(self, start: int, end: int) -> slice:
        """The rows of these images' features that belong to tokens ``[start, end)`` of the prompt."""
        first, last = (int(np.clip(place - self._starts, 0, self._counts).sum()) for place in (start, end))
        return slice(first - self._before, last - self._before)
