"""What a slot of the cache holds, and how much of a new prompt begins in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlpack.preprocess import Prompt


class SeenImage(NamedTuple):
    """An image of a prompt: where its placeholders begin, and the hash of its pixels and grid."""

    start: int
    digest: bytes


class Tokens(NamedTuple):
    """A sequence of tokens that can be compared with others.

    Placeholders of two images are equal tokens, so a prefix is the same only if its images are, too.

    Attributes:
        ids: int32 ``[S]``, placeholders expanded.
        images: in the order of their placeholders.
    """

    ids: npt.NDArray[np.int32]
    images: Sequence[SeenImage] = ()


def tokens_of(prompt: Prompt, image_token_id: int | None) -> Tokens:
    """A prompt's tokens, with a hash of each image."""
    ids = prompt.input_ids[0]
    if not prompt.has_images:
        return Tokens(ids)
    places = np.flatnonzero(ids == image_token_id)  # of all placeholders, in order
    images, first = [], 0
    for (pixels, grid), count in zip(prompt.images(), prompt.num_image_tokens, strict=True):
        digest = hashlib.sha256(grid.tobytes())
        digest.update(np.ascontiguousarray(pixels).data)
        images.append(SeenImage(int(places[first]), digest.digest()))
        first += int(count)
    return Tokens(ids, tuple(images))


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many tokens are the same from the beginning: up to the first other id or the first other image."""
    length = min(len(left.ids), len(right.ids))
    other = np.flatnonzero(left.ids[:length] != right.ids[:length])
    common = int(other[0]) if len(other) else length
    for one, two in zip_longest(left.images, right.images):
        if one != two:  # also where a model wrote a placeholder itself, which is no image
            return min(common, *(image.start for image in (one, two) if image is not None))
    return common
