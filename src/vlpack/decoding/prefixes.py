"""Prefix matching: how many of a prompt's first tokens are equal to those that a slot of the cache already holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.preprocess import Prompt


class SeenImage(NamedTuple):
    """An image of a prompt, as it is compared with others.

    Attributes:
        start: index of its first placeholder among the prompt's tokens.
        digest: SHA-256 of its grid and pixels.
    """

    start: int
    digest: bytes


class Tokens(NamedTuple):
    """A sequence of tokens with hashes of its images, so that it can be compared with others.

    All images have placeholders with the same token id, so two prefixes are equal only if their images are equal, too.

    Attributes:
        ids: token ids with expanded placeholders, int32 ``[S]``.
        images: images in the order of their placeholders.
    """

    ids: npt.NDArray[np.int32]
    images: Sequence[SeenImage] = ()


def tokens_of(prompt: Prompt, image_token_id: int | None) -> Tokens:
    """The tokens of a prompt, with a hash of each image.

    Args:
        prompt: the prompt.
        image_token_id: token id of placeholders of images; None if the package takes no images.
    """
    ids = prompt.input_ids[0]
    if not prompt.has_images:
        return Tokens(ids)
    places = np.flatnonzero(ids == image_token_id)  # indices of all placeholders, in order
    images, first = [], 0
    for (pixels, grid), count in zip(prompt.images(), prompt.num_image_tokens, strict=True):
        digest = hashlib.sha256(grid.tobytes())
        digest.update(np.ascontiguousarray(pixels).data)
        images.append(SeenImage(int(places[first]), digest.digest()))
        first += int(count)
    return Tokens(ids, tuple(images))


def common_prefix(left: Tokens, right: Tokens) -> int:
    """The number of tokens of the common prefix, which ends at the first different id or the first different image."""
    length = min(len(left.ids), len(right.ids))
    other = np.flatnonzero(left.ids[:length] != right.ids[:length])
    common = int(other[0]) if len(other) else length
    for one, two in zip_longest(left.images, right.images):
        if one != two:  # also if only one has an image here: a generated placeholder stands for no image
            return min(common, *(image.start for image in (one, two) if image is not None))
    return common
