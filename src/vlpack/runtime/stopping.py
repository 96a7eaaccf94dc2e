"""Stop texts: texts at which an answer ends, such as a line break."""

from __future__ import annotations

from collections.abc import Sequence

from vlpack.errors import OptionError


class StopTexts:
    """Ends a streamed text before the first occurrence of a stop text.

    The end of the text so far is held back while it may be the start of a stop text.

    Args:
        stops: stop texts, or a single one.

    Raises:
        OptionError: a stop text is empty or not a text.
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        self._stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(self._stops, (list, tuple)) or not all(isinstance(s, str) and s for s in self._stops):
            raise OptionError(
                f"stop is {stops!r}; it must be a list of texts that are not empty.", 'For example stop=["\\n"].'
            )
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Adds a piece of text; returns the text that is certain now, and whether the answer ends after it."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """Returns the text that was held back, for an answer that ends without a stop text."""
        text, self._held = self._held, ""
        return text
