"""Parts of prompts, which are shown to the decoder one after the other, and which of them share a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vlpack.engine.graphs import Array
from vlpack.engine.prefixes import common_prefix
from vlpack.engine.request import Request

SHORT = 16
"""Fewer tokens of a prompt cost as much as so many, as the weights are read for them all the same."""


class Part(NamedTuple):
    """A part of a prompt that is shown in one call: the tokens from ``start`` to ``end``."""

    request: Request
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return self.end - self.start

    @property
    def last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.end == len(self.request.tokens.ids)

    def features(self) -> Array | None:
        """Those of its placeholders, ``[F, W]``; None where all images of the prompt were shown before.

        Raises:
            VlpackError: the images could not be looked at.
        """
        request = self.request
        if request.features is None:
            return None
        features = request.features.result()
        before = int(request.prompt.num_image_tokens[: request.first_image].sum())  # placeholders without features here
        images, counts = request.tokens.images, request.prompt.num_image_tokens
        first, last = (
            sum(min(max(place - image.start, 0), int(count)) for image, count in zip(images, counts, strict=True))
            for place in (self.start, self.end)
        )
        return features[first - before : last - before]


def short_ends(first: Part, waiting: Iterable[Request], room: int, context: int) -> list[Part]:
    """The last tokens of other prompts, where these are few and none gains by waiting until another was shown.

    Args:
        first: what is shown anyway.
        waiting: requests whose prompts are being shown.
        room: how many tokens may be shown beside it.
        context: tokens of a slot, which have to take the longest of these parts, padding included.
    """
    parts, held = [first], first.start
    for request in waiting:
        slot, size = request.slot, len(request.tokens.ids)
        if request is first.request or request.features is not None or slot is None:
            continue
        part = Part(request, slot.length, size)
        longest = max(part.size, *(other.size for other in parts))
        if part.size > min(room, SHORT) or max(held, part.start) + longest > context:
            continue
        common = max(common_prefix(request.tokens, other.request.tokens) for other in parts)
        if min(common, size - 1) > part.start:
            continue
        parts.append(part)
        room, held = room - part.size, max(held, part.start)
    return parts[1:]
