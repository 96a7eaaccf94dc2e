"""Parts of prompts: each is processed in one call of the decoder, and short ones share a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vlpack.decoding.graphs import Array
from vlpack.decoding.prefixes import common_prefix
from vlpack.engine.request import Request

SHORT = 16
"""Number of tokens below which a call is not cheaper, because it must read all weights anyway."""


class Part(NamedTuple):
    """A part of a prompt that is processed in one call: the tokens from index ``start`` to before ``end``."""

    request: Request
    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of tokens of the part."""
        return self.end - self.start

    @property
    def last(self) -> bool:
        """Whether the part is the last one of its prompt."""
        return self.end == len(self.request.tokens.ids)

    def features(self) -> Array | None:
        """The image features of the part's placeholders, ``[F, W]``; None if no image had to be encoded.

        Raises:
            VlpackError: the vision encoder failed.
        """
        request = self.request
        if request.features is None:
            return None
        assert request.unseen is not None, "its features are computed"
        return request.features.result()[request.unseen.within(self.start, self.end)]


def short_ends(first: Part, waiting: Iterable[Request], room: int, context: int) -> list[Part]:
    """The short last parts of other prompts that can share a call with a given part.

    A prompt that could reuse tokens of another part in this call is left out, because waiting saves more.

    Args:
        first: part that is processed in this call anyway.
        waiting: requests whose prompts are being processed.
        room: largest number of additional tokens in the call.
        context: number of tokens of a slot, which must also hold the padding up to the longest part.
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
